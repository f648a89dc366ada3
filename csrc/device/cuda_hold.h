// Streams that stand still while memory changes its place under them.
//
// A stream is stopped by two operations in it: it writes a number to a flag, and waits until the
// CPU has written the same number to the gate. While one is stopped, some calls of the driver block
// whoever makes them until it goes on, among them cudaFree and the first launch of a kernel, and
// such a thread may have locks of the driver that a submission needs. So nothing is submitted while
// anything is stopped, with one exception: where several streams must be stopped, the last
// submission comes after the first has taken effect. Then a watchdog, which calls nothing of the
// driver, opens the gate should that take too long, and nothing is moved.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace pgk {

// What the CPU and the device tell each other. It lies in pinned memory, which has the same address
// for both. Flags hold the number of the last hold that wrote them.
struct CudaFlags {
  static constexpr std::size_t kLanes = 3;
  static constexpr std::size_t kPages = 16;  // of a lane
  static constexpr std::size_t kStops = 1024;

  alignas(64) std::uint32_t gate;
  alignas(64) std::uint32_t started;  // the default stream has come to the graph
  std::uint32_t finished;             // nothing of the graph runs any more, it waits at the gate
  std::array<std::array<std::uint32_t, kPages>, kLanes> ready;
  alignas(64) std::array<std::array<Fingerprint, kPages>, kLanes> contents;
  alignas(64) std::array<Fingerprint, kPages> staged;  // what was copied ahead of a hold
  // Of streams, used in turn: a flag may be written long after the hold it was for was given up.
  alignas(64) std::array<std::uint32_t, kStops> stopped;

  template <typename T>
  static CUdeviceptr address_of(const T& member) {
    return reinterpret_cast<CUdeviceptr>(&member);
  }
  static bool holds(std::uint32_t& flag, std::uint32_t number) {
    return std::atomic_ref(flag).load(std::memory_order_acquire) == number;
  }
};

// Opens the gate of a hold if streams stay stopped for too long, from a thread of its own.
class CudaWatchdog : public std::enable_shared_from_this<CudaWatchdog> {
 public:
  CudaWatchdog(CudaFlags& flags, std::uint32_t number, std::span<std::uint32_t> stopped)
      : flags_(flags), number_(number), stopped_(stopped) {}

  void start();
  // Whether it has opened the gate.
  bool has_opened() const { return opened_.load(std::memory_order_acquire); }
  // From then on it will not, and looks at nothing. False if it has.
  bool stop();

 private:
  using Clock = std::chrono::steady_clock;

  void watch();
  bool must_open();

  CudaFlags& flags_;
  const std::uint32_t number_;
  const std::span<std::uint32_t> stopped_;
  const Clock::time_point started_at_ = Clock::now();
  std::optional<Clock::time_point> stopped_at_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool watching_ = true;
  std::atomic<bool> opened_{false};
};

// What the holds of a device need. The device's context must be current.
class CudaHolds {
 public:
  CudaHolds(const CudaDriver& driver, CUcontext context);
  ~CudaHolds();
  CudaHolds(const CudaHolds&) = delete;
  CudaHolds& operator=(const CudaHolds&) = delete;

  CUcontext context() const { return context_; }
  CudaFlags& flags() { return *flags_; }
  // Of ours, idle.
  CUstream stream() const { return stream_; }
  // The number of the next hold. Starts at 1: flags are 0 before the first.
  std::uint32_t next_number() { return ++number_; }

 private:
  friend class CudaHold;
  std::span<std::uint32_t> take_stops(std::size_t count);

  const CudaDriver& driver_;
  CUcontext context_;
  CudaFlags* flags_ = nullptr;
  CUstream stream_ = nullptr;
  CUevent event_ = nullptr;
  std::uint32_t number_ = 0;
  std::size_t next_stop_ = 0;
};

// One hold, from its first submission to the opening of the gate. One at a time for a device.
class CudaHold {
 public:
  CudaHold(CudaHolds& holds, std::uint32_t number) : holds_(holds), number_(number) {}
  // Opens the gate, and waits until nothing of the graph runs any more.
  ~CudaHold();
  CudaHold(const CudaHold&) = delete;
  CudaHold& operator=(const CudaHold&) = delete;

  // Launches the graph on the default stream, once all of `streams` are stopped: non-blocking ones,
  // since the default stream would wait for others, and they for it. The graph must write `started`
  // first and stop at `finished` last. When this returns, no call of the driver's is left
  // to make but those of mapping. Throws ErrorCode::busy if that could not be had.
  void launch(CUgraphExec graph, std::span<const CUstream> streams);
  // Between looks at flags. Throws ErrorCode::device if the device has failed, and none will come.
  void pause();
  // After a flag that was seen.
  void renew() { since_ = Clock::now(); }

 private:
  using Clock = std::chrono::steady_clock;

  void refuse_capture(CUstream stream) const;
  void stop(std::span<const CUstream> streams);
  void await(std::uint32_t& flag);
  void ask_device();
  [[noreturn]] void give_up(const char* why) const;

  CudaHolds& holds_;
  std::uint32_t number_;
  bool launched_ = false;
  std::shared_ptr<CudaWatchdog> watchdog_;  // null where only the default stream is held
  Clock::time_point since_ = Clock::now();
  std::shared_ptr<std::atomic<CUresult>> failure_;  // null until the device is asked
};

}  // namespace pgk
