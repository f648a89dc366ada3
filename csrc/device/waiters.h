// Threads that block on behalf of others, as many as there are waits at a time. They are kept for
// the next wait and never end: one may sit in the driver while the process exits.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>

namespace pgk {

class Waiters {
 public:
  // Calls `work`, which may block and must not throw, in a thread of its own.
  static void wait_for(std::function<void()> work) { instance().add(std::move(work)); }

 private:
  static Waiters& instance();
  void add(std::function<void()> work);
  void run();

  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<std::function<void()>> work_;
  std::size_t idle_ = 0;
};

}  // namespace pgk
