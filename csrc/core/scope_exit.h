// Undoes a step of a function that fails later; dismissed on success. What it calls may fail
// again: the failure is dropped, the first one is what the caller hears of.
#pragma once

#include <utility>

#include "core/error.h"

namespace pgk {

template <typename Undo>
class ScopeExit {
 public:
  explicit ScopeExit(Undo undo) : undo_(std::move(undo)) {}
  ScopeExit(const ScopeExit&) = delete;
  ScopeExit& operator=(const ScopeExit&) = delete;
  ~ScopeExit() {
    if (!armed_) return;
    try {
      undo_();
    } catch (const Error&) {
    }
  }
  void dismiss() { armed_ = false; }

 private:
  Undo undo_;
  bool armed_ = true;
};

}  // namespace pgk
