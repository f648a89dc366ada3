// What torch's profilers of memory are told of a context's blocks, as torch's own allocators do.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <atomic>

#include "core/context.h"

namespace pgk {

namespace detail {
inline std::atomic<bool> profiler_was_seen{false};
}

inline bool profiler_sees_allocation() {
  if (!c10::memoryProfilingEnabled()) [[likely]]
    return false;
  detail::profiler_was_seen.store(true, std::memory_order_relaxed);
  return true;
}

// Asking takes as long as all else that a free does. So until the first profiler of the process
// sees an allocation of a context, it is not told of frees: of blocks that were there before it
// began.
inline bool profiler_sees_free() {
  return detail::profiler_was_seen.load(std::memory_order_relaxed) && c10::memoryProfilingEnabled();
}

// To the profilers of the calling thread.
void tell_profiler(const Context& context, void* pointer, bool allocated, c10::Device device);

}  // namespace pgk
