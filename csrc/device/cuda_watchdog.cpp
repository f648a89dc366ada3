#include "device/cuda_watchdog.h"

#include "device/waiters.h"

namespace pgk {

bool CudaWatchdog::watch_for(std::chrono::nanoseconds time) {
  {
    const std::lock_guard lock(mutex_);
    deadline_ = Clock::now() + time;
    if (!is_started_) Waiters::wait_for([self = shared_from_this()] { self->watch(); });
    is_started_ = true;
  }
  changed_.notify_one();
  return !has_opened();
}

bool CudaWatchdog::stop() {
  {
    const std::lock_guard lock(mutex_);
    watching_ = false;
  }
  changed_.notify_one();
  return !has_opened();
}

void CudaWatchdog::watch() {
  std::unique_lock lock(mutex_);
  while (watching_) {
    if (Clock::now() >= deadline_) {
      opened_.store(true, std::memory_order_release);
      flags_.open(number_);
      return;
    }
    changed_.wait_until(lock, deadline_);
  }
}

}  // namespace pgk
