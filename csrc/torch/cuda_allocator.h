// VRAM contexts under torch: a decorator of torch's native CUDA allocator that serves threads in a
// session from their context's arena and leaves everything else to native.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <memory>

#include "core/manager.h"

namespace pgk {

// The one decorator of the process. Throws ErrorCode::invalid_value unless what torch uses now is
// its native allocator. Sessions are served once it is installed and a manager is set.
std::shared_ptr<c10::cuda::CUDACachingAllocator::CUDAAllocator> cuda_allocator();

// Puts it in the place of the native allocator, whether or not that is in use already.
void install_cuda_allocator();
// Puts the native allocator back. Blocks that are still alive are freed correctly all the same.
void uninstall_cuda_allocator();
// Whose contexts it serves; null for none. The manager's device is a CudaDevice.
void serve_contexts_of(const std::shared_ptr<Manager>& manager);

// Whether a graph or a MemPool is alive or being captured whose memory a context provides.
bool has_cuda_pools();

}  // namespace pgk
