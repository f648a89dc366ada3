// Captures of graphs and holds of streams keep out of each other's way: to hold streams, or only to
// ask whether one of a capture is idle, would break the capture.
//
// A capture is known from just before it begins until it has ended. One that fails may never say
// so; the driver is asked whether it still goes on. Captures that nobody announces are not known.
// Work that is part of a capture, and cannot wait for its end, says so: see Beside.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "device/cuda_driver.h"

namespace pgk {

class CudaCaptures {
 public:
  using Clock = std::chrono::steady_clock;

  // That the calling thread works for a capture: what it does meanwhile goes on beside captures.
  class Beside {
   public:
    Beside() : before_(is_beside_) { is_beside_ = true; }
    ~Beside() { is_beside_ = before_; }
    Beside(const Beside&) = delete;
    Beside& operator=(const Beside&) = delete;

   private:
    bool before_;
  };

  // That no capture begins.
  class KeptOut {
   public:
    ~KeptOut() { captures_.let_in(); }
    KeptOut(const KeptOut&) = delete;
    KeptOut& operator=(const KeptOut&) = delete;

    bool is_beside_capture() const { return is_beside_capture_; }

   private:
    friend class CudaCaptures;
    KeptOut(CudaCaptures& captures, bool is_beside_capture)
        : captures_(captures), is_beside_capture_(is_beside_capture) {}

    CudaCaptures& captures_;
    const bool is_beside_capture_;
  };

  explicit CudaCaptures(const CudaDriver& driver) : driver_(driver) {}

  // The calling thread is about to capture on `stream`, which others of these may join. Waits while
  // captures are kept out. Returns its number. Throws ErrorCode::busy if that does not end.
  std::uint64_t begin(CUstream stream, const std::vector<CUstream>& known);
  // Waits for what goes on beside it, which leaves captured streams alone. Where the driver still
  // captures, since another pool is used for a while, it is remembered until that ends.
  void end(std::uint64_t number);
  // Waits for captures to end; beside one only for what its stream was given before. Throws
  // Restless.
  KeptOut keep_out(Clock::time_point deadline);
  // The same without keeping new ones out.
  void await(Clock::time_point deadline);
  // Whether the calling thread is, or works for, a capture.
  bool is_beside() const;

 private:
  struct Capture {
    std::uint64_t number = 0;
    CUstream stream = nullptr;  // null: it is over
    std::thread::id thread;
    Clock::time_point announced_at;
    std::vector<CUevent> before;  // what streams had been given then
    bool has_begun = false;
  };
  using Lock = std::unique_lock<std::mutex>;

  void let_in();
  void await(Lock& lock, Clock::time_point deadline);
  void forget_ended();
  bool goes_on(const Capture& capture) const;
  bool is_over(Capture& capture) const;
  bool is_beside_locked() const;
  std::vector<CUevent> mark(const std::vector<CUstream>& streams) const;
  void forget(std::vector<CUevent>& events) const;
  bool is_past(const std::vector<CUevent>& events) const;

  const CudaDriver& driver_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Capture> captures_;
  std::uint64_t last_number_ = 0;
  std::size_t keepers_ = 0;
  std::size_t waiting_ = 0;  // to become one
  static inline thread_local bool is_beside_ = false;
};

}  // namespace pgk
