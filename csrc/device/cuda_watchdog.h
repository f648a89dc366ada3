// A thread that sees to it that no hold lasts while streams do not come to rest.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "device/cuda_flags.h"

namespace pgk {

// Opens a hold if streams are not at rest in time, from a thread of its own.
class CudaWatchdog : public std::enable_shared_from_this<CudaWatchdog> {
 public:
  CudaWatchdog(CudaFlags& flags, std::uint32_t number) : flags_(flags), number_(number) {}

  // From the first call on, and anew with each. False if it has opened the hold.
  bool watch_for(std::chrono::nanoseconds time);
  bool has_opened() const { return opened_.load(std::memory_order_acquire); }
  // From then on it looks at nothing. False if it has opened the hold.
  bool stop();

 private:
  using Clock = std::chrono::steady_clock;

  void watch();

  CudaFlags& flags_;
  const std::uint32_t number_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Clock::time_point deadline_;
  bool is_started_ = false;
  bool watching_ = true;
  std::atomic<bool> opened_{false};
};

}  // namespace pgk
