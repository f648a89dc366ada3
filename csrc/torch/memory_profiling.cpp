#include "torch/memory_profiling.h"

#include <cstdint>

namespace pgk {

void tell_profiler(const Context& context, void* pointer, bool allocated, c10::Device device) {
  const auto bytes = static_cast<std::int64_t>(context.block_bytes(pointer));
  c10::reportMemoryUsageToProfiler(pointer, allocated ? bytes : -bytes, context.used_bytes(),
                                   context.resident_bytes(), device);
}

}  // namespace pgk
