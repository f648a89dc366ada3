#include "device/waiters.h"

#include <thread>

namespace pgk {

Waiters& Waiters::instance() {
  static auto* waiters = new Waiters;  // the threads outlive static destructors
  return *waiters;
}

void Waiters::add(std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  // Work that is queued has an idle thread on its way to it.
  if (idle_ <= work_.size()) std::thread(&Waiters::run, this).detach();
  work_.push_back(std::move(work));
  more_.notify_one();
}

void Waiters::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    ++idle_;
    more_.wait(lock, [this] { return !work_.empty(); });
    --idle_;
    const std::function<void()> work = std::move(work_.front());
    work_.pop_front();
    lock.unlock();
    work();
    lock.lock();
  }
}

}  // namespace pgk
