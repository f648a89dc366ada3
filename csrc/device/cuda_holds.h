// What the holds of a device share (cuda_hold.h): streams of ours, flags, and how often they were.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "device/cuda_driver.h"
#include "device/cuda_flags.h"
#include "device/cuda_pace.h"

namespace pgk {

// The device's context must be current.
class CudaHolds {
 public:
  CudaHolds(const CudaDriver& driver, CUcontext context);
  ~CudaHolds();
  CudaHolds(const CudaHolds&) = delete;
  CudaHolds& operator=(const CudaHolds&) = delete;

  CUcontext context() const { return context_; }
  // Of those before the next one.
  CudaPace& pace() { return pace_; }
  CudaFlags& flags() { return *flags_; }
  // Ours, and one for what is done beside it; idle outside of holds.
  CUstream stream() const { return streams_[turn_]; }
  CUstream branch() const { return streams_[turn_ + 1]; }
  // From now on others: their hardware queues may be blocked by somebody.
  void change_streams() { turn_ = (turn_ + 2) % kStreams; }
  // The number of the next hold. Starts at 1: flags are 0 before the first.
  std::uint32_t next_number() { return ++number_; }
  // Whether the driver can hold all streams at once.
  static bool has_context_wait(const CudaDriver& driver) {
    return driver.cuCtxWaitEvent_fn != nullptr;
  }
  // How many streams can be stopped at a time, beside ours.
  static std::size_t most_stops();

 private:
  friend class CudaHold;
  std::span<std::uint32_t> take_stops(std::size_t count);
  void release();

  const CudaDriver& driver_;
  CUcontext context_;
  CudaFlags* flags_ = nullptr;
  static constexpr std::size_t kStreams = 8;
  std::array<CUstream, kStreams> streams_{};
  std::size_t turn_ = 0;
  CUevent event_ = nullptr;  // behind what is to be waited for
  CUevent forked_ = nullptr;
  CUevent joined_ = nullptr;
  CudaPace pace_;
  std::uint32_t number_ = 0;
  std::size_t next_stop_ = 0;
};

}  // namespace pgk
