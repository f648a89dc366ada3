// Work that blocks, in a thread of its own, for an event loop that must not.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device/waiters.h"
#include "python/event_fd.h"

namespace pgk::python {

// What the work keeps, a held context say, lives as long as the job; nobody need wait for it.
class Job {
 public:
  // Returns what is to be kept.
  using Work = std::function<std::shared_ptr<void>()>;

  explicit Job(Work work) : state_(std::make_shared<State>()) {
    Waiters::wait_for([state = state_, work = std::move(work)] {
      std::shared_ptr<void> kept;
      std::exception_ptr failure;
      try {
        kept = work();
      } catch (...) {
        failure = std::current_exception();
      }
      const std::lock_guard lock(state->mutex);
      state->kept = std::move(kept);
      state->failure = failure;
      state->is_done = true;
      for (const auto& alarm : state->alarms) alarm->ring();
    });
  }

  bool is_done() const {
    const std::lock_guard lock(state_->mutex);
    return state_->is_done;
  }
  void notify(const std::shared_ptr<EventFd>& alarm) const {
    const std::lock_guard lock(state_->mutex);
    if (state_->is_done) {
      alarm->ring();
    } else {
      state_->alarms.push_back(alarm);
    }
  }
  // Throws what the work threw.
  void result() const {
    const std::lock_guard lock(state_->mutex);
    if (state_->failure) std::rethrow_exception(state_->failure);
  }

 private:
  struct State {
    mutable std::mutex mutex;
    bool is_done = false;
    std::shared_ptr<void> kept;
    std::exception_ptr failure;
    std::vector<std::shared_ptr<EventFd>> alarms;
  };
  std::shared_ptr<State> state_;
};

}  // namespace pgk::python
