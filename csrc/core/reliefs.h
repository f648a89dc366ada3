// Memory that its holder can do without, outside of contexts or in them: torch's caches, and what
// torch keeps of theirs. It is asked for before live data of others is moved.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace pgk {

// In the order in which they are asked, from what costs least.
class Reliefs {
 public:
  // Called without any lock; may wait for work. `device_is_short`: memory of anybody's would help,
  // else only a context's own. Returns whether anything may have come free.
  using Relief = std::function<bool(bool device_is_short)>;

  explicit Reliefs(std::vector<Relief> reliefs) : reliefs_(std::move(reliefs)) {}

  // Those that one request has not asked yet.
  class Left {
   public:
    // Asks the next ones until something came free; false once there are none.
    bool ask(const Reliefs& reliefs, bool device_is_short);

   private:
    std::size_t next_ = 0;
  };

 private:
  std::vector<Relief> reliefs_;
};

}  // namespace pgk
