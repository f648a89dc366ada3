// Captures of graphs and holds of streams keep out of each other's way: to hold streams, or only to
// ask whether one of a capture is idle, would break the capture.
//
// A capture is known from just before it begins until it has ended. One that fails may never say
// so; the driver is asked whether it still goes on. Captures that nobody announces are not known.
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

  // That no capture begins. The thread that asked for it may be capturing itself.
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

  // The calling thread is about to capture on `stream`. Waits while captures are kept out. Throws
  // ErrorCode::busy if that does not end.
  void begin(CUstream stream);
  void end(CUstream stream);
  // Waits for the captures of other threads. Throws Restless.
  KeptOut keep_out(Clock::time_point deadline);

 private:
  struct Capture {
    CUstream stream = nullptr;
    std::thread::id thread;
    Clock::time_point announced_at;
    bool has_begun = false;
  };

  void let_in();
  bool is_over(Capture& capture) const;

  const CudaDriver& driver_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Capture> captures_;
  std::size_t keepers_ = 0;
  std::size_t waiting_ = 0;  // to become one
};

}  // namespace pgk
