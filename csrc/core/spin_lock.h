// A lock for critical sections of some ten instructions: one atomic exchange to take, a plain
// store to give back, where a std::mutex needs two exchanges and two calls. Whoever waits long
// (a context that grows holds it over device calls) sleeps instead of burning a core.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

namespace pgk {

class SpinLock {
 public:
  void lock() {
    if (!taken_.exchange(true, std::memory_order_acquire)) [[likely]]
      return;
    wait_and_lock();
  }
  void unlock() { taken_.store(false, std::memory_order_release); }

 private:
  static constexpr int kSpins = 200;
  static constexpr int kYields = 50;
  static constexpr std::chrono::microseconds kSleep{50};

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void wait_and_lock() {
    for (int attempt = 0;; ++attempt) {
      if (!taken_.load(std::memory_order_relaxed) &&
          !taken_.exchange(true, std::memory_order_acquire)) {
        return;
      }
      if (attempt < kSpins) {
        pause();
      } else if (attempt < kSpins + kYields) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(kSleep);
      }
    }
  }

  std::atomic<bool> taken_{false};
};

}  // namespace pgk
