#include "torch/cuda_report.h"

#include <c10/core/Allocator.h>
#include <c10/core/impl/GPUTrace.h>

namespace pgk {

c10::Device torch_device(const Context& context) {
  const auto index = static_cast<c10::DeviceIndex>(cuda_device(context).ordinal());
  return {c10::DeviceType::CUDA, index};
}

void report(const Context& context, void* pointer, bool allocated) {
  if (const auto* trace = c10::impl::GPUTrace::get_trace()) [[unlikely]] {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    if (allocated) {
      (*trace)->trace_gpu_memory_allocation(c10::kCUDA, address);
    } else {
      (*trace)->trace_gpu_memory_deallocation(c10::kCUDA, address);
    }
  }
  if (c10::memoryProfilingEnabled()) [[unlikely]] {
    const auto bytes = static_cast<std::int64_t>(context.block_bytes(pointer));
    c10::reportMemoryUsageToProfiler(pointer, allocated ? bytes : -bytes, context.used_bytes(),
                                     context.resident_bytes(), torch_device(context));
  }
}

}  // namespace pgk
