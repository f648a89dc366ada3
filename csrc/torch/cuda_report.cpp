#include "torch/cuda_report.h"

#include <cstdint>

namespace pgk {

void tell_trace(const c10::impl::PyInterpreter& trace, const void* pointer, bool allocated) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (allocated) {
    trace->trace_gpu_memory_allocation(c10::kCUDA, address);
  } else {
    trace->trace_gpu_memory_deallocation(c10::kCUDA, address);
  }
}

}  // namespace pgk
