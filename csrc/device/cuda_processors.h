// The streaming multiprocessors (SMs) of a device in groups, and streams that are confined to some
// of them: streams of green contexts. Kernels launched from the primary context, torch's, run in
// such a stream on its SMs alone.
//
// All groups come from one split of the device, so any of them can be put together. A green context
// is made when a set is used first, and never destroyed: its streams would die with it, and
// libraries keep raw handles of them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace pgk {

class CudaProcessors {
 public:
  explicit CudaProcessors(const CudaDriver& driver) : driver_(driver) {}

  // Finds the groups of a device. Without a driver that can divide it there are none.
  void divide(CUdevice device);
  const std::vector<unsigned>& groups() const { return sizes_; }
  const std::string& why_undivided() const { return why_undivided_; }

  // One that does not synchronise with the default stream. Not by two threads at once.
  CUstream create_stream(ProcessorSet set, int priority);

 private:
  CUgreenCtx context_of(ProcessorSet set);

  const CudaDriver& driver_;
  CUdevice device_ = 0;
  std::vector<CUdevResource> groups_;
  std::vector<unsigned> sizes_;
  std::map<ProcessorSet, CUgreenCtx> contexts_;
  std::string why_undivided_;
};

}  // namespace pgk
