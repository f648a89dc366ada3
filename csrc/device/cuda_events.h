// Events of a CUDA device by numbers that stay valid forever: the driver's are reused once they are
// done.
//
// Thread-safe. The device's context must be current in all calls, and relaxed capture mode.
#pragma once

#include <mutex>
#include <unordered_map>
#include <vector>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace pgk {

class CudaEvents {
 public:
  explicit CudaEvents(const CudaDriver& driver) : driver_(driver) {}

  // As Device's functions of these names.
  EventId record(CUstream stream);
  // Of all streams of the context at once.
  EventId record_all(CUcontext context);
  void wait(CUstream stream, EventId event);
  bool is_done(EventId event);
  void synchronize(EventId event);

 private:
  template <typename Record>
  EventId record_by(const Record& record);
  CUevent pending(EventId event) const;
  void retire(EventId event);
  void sweep();

  const CudaDriver& driver_;
  mutable std::mutex mutex_;
  std::unordered_map<EventId, CUevent> pending_;
  std::vector<CUevent> idle_;
  EventId next_ = 1;
  static constexpr std::size_t kFew = 64;
  std::size_t sweep_at_ = kFew;
};

}  // namespace pgk
