// What torch's observers are told of a context's blocks: as native does for its own, for profilers
// and for torch's CUDA sanitizer.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/impl/GPUTrace.h>

#include "core/context.h"
#include "device/cuda_device.h"
#include "torch/memory_profiling.h"

namespace pgk {

inline CudaDevice& cuda_device(const Context& context) {
  return static_cast<CudaDevice&>(context.device());
}

inline c10::Device torch_device(const Context& context) {
  const auto index = static_cast<c10::DeviceIndex>(cuda_device(context).ordinal());
  return {c10::DeviceType::CUDA, index};
}

void tell_trace(const c10::impl::PyInterpreter& trace, const void* pointer, bool allocated);

inline void report(const Context& context, void* pointer, bool allocated) {
  if (const auto* trace = c10::impl::GPUTrace::get_trace()) [[unlikely]]
    tell_trace(*trace, pointer, allocated);
  if (allocated ? profiler_sees_allocation() : profiler_sees_free()) [[unlikely]]
    tell_profiler(context, pointer, allocated, torch_device(context));
}

}  // namespace pgk
