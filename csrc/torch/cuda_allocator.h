// VRAM contexts under torch: a decorator of torch's native CUDA allocator that serves threads in a
// session from their context's arena and leaves everything else to native.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "core/manager.h"
#include "torch/cuda_pools.h"

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

// Bytes on the current device that belong to no context.
at::Tensor empty_outside(std::int64_t bytes);

// See CudaPools.
std::optional<CudaPools::Announced> take_announced_capture();
void abandon_capture(const CudaPools::Announced& capture);
bool is_begun_capture(const CudaPools::Announced& capture);

// The calling thread leaves a session on this stream, still its current one.
void leave_workspaces(StreamId stream);
// Has torch let go of the workspaces that it keeps of a context in which nobody works any more,
// unless a graph may hold them.
void drop_workspaces_of(const Context& context);
std::size_t workspace_bytes_of(std::uint64_t context_id);

}  // namespace pgk
