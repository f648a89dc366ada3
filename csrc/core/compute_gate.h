// Lets the work of contexts that yield wait while guaranteed ones work: between two operations, on
// the thread that submits them, since what a device has been given cannot be taken back.
//
// A guaranteed context works while it has open sessions and for a moment after, since the next
// request often follows at once; but not if its stream has been idle for a while. Where work is
// done as it is submitted, sessions are all there is to see. Nobody is held back for longer than a
// deadline, so whoever waits for who is held back gets on.
//
// So that little is left to wait for when guaranteed work comes, a thread submits only as much
// ahead as the device does in half a millisecond, or one operation if that takes longer.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device/device.h"

namespace pgk {

class Context;

class ComputeGate {
 public:
  using Clock = std::chrono::steady_clock;

  // What one thread has submitted and the device not done; its alone.
  class RunAhead {
    friend class ComputeGate;
    struct Mark {
      EventId event = 0;
      Clock::time_point submitted;  // when what it marks the end of was about to be submitted
    };
    // Waits until the device is near enough.
    void limit(Device& device, StreamId stream);
    void adapt(Clock::duration took);

    StreamId stream_ = 0;
    std::deque<Mark> marks_;
    std::size_t window_ = 0;  // marks that may be outstanding
    Clock::time_point last_;  // when the thread was let pass, and a mark was made
    bool passes_ = false;     // guaranteed sessions are open, and their streams idle
  };

  explicit ComputeGate(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  // A guaranteed context, and its sessions that keep it active.
  void enrol(const std::shared_ptr<Context>& context);
  void begin_session() { sessions_.fetch_add(1, std::memory_order_relaxed); }
  void end_session() {
    ended_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    sessions_.fetch_sub(1, std::memory_order_release);
  }

  // Before work is submitted to `stream`. Blocks; not with any lock. Throws ErrorCode::device.
  void pass(StreamId stream, RunAhead& ahead);

 private:
  bool is_open() const;
  bool is_working();
  void hold(RunAhead& ahead);

  const std::shared_ptr<Device> device_;
  std::atomic<std::uint32_t> sessions_{0};
  std::atomic<Clock::rep> ended_{0};  // when the last one did
  std::mutex mutex_;                  // of the set; held over questions to the device
  std::vector<std::weak_ptr<Context>> guaranteed_;
};

}  // namespace pgk
