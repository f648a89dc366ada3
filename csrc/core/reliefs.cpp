#include "core/reliefs.h"

#include "core/scope_exit.h"

namespace pgk {

bool Reliefs::Left::ask(const Reliefs& reliefs, bool device_is_short) {
  // What a relief requests itself is not relieved: it would be asked for ever.
  thread_local bool is_asking = false;
  if (is_asking) return false;
  is_asking = true;
  const ScopeExit leave([] { is_asking = false; });
  while (next_ < reliefs.reliefs_.size()) {
    if (reliefs.reliefs_[next_++](device_is_short)) return true;
  }
  return false;
}

}  // namespace pgk
