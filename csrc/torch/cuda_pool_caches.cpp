// What private pools keep and have not handed out.
#include <algorithm>
#include <thread>

#include "core/address_table.h"
#include "torch/cuda_pools.h"
#include "torch/cuda_streams.h"

namespace pgk {
namespace {

using Lock = std::lock_guard<std::recursive_mutex>;
using Native = CudaPools::Native;

// Whether native would serve the stream's request without another segment.
bool has_free_block(Native& native, CudaPools::Id id, std::size_t bytes, cudaStream_t stream) {
  const auto snapshot = native.snapshot(id, /*include_traces=*/false);
  return std::any_of(snapshot.segments.begin(), snapshot.segments.end(), [&](const auto& segment) {
    return segment.stream == stream &&
           std::any_of(segment.blocks.begin(), segment.blocks.end(), [&](const auto& block) {
             return !block.allocated && !block.active && block.size >= bytes;
           });
  });
}

}  // namespace

std::size_t CudaPools::unused_bytes_of(const Context& context) const {
  std::size_t bytes = 0;
  const Lock lock(mutex_);
  for (const auto& [key, pool] : pools_) {
    if (!pool.provider || pool.provider->count() == 0) continue;
    const auto snapshot = native_->snapshot(key.second, /*include_traces=*/false);
    for (const auto& segment : snapshot.segments) {
      const auto* address = reinterpret_cast<const void*>(segment.address);
      if (AddressTable::segment_owner_of(address) != &context) continue;
      bytes += segment.total_size - segment.allocated_size;
    }
  }
  return bytes;
}

void CudaPools::set_use_on_oom(c10::DeviceIndex device, Id id, bool use) {
  const Lock lock(mutex_);
  native_->setUseOnOOM(device, id, use);
  if (const auto pool = pools_.find({device, id}); pool != pools_.end()) {
    pool->second.use_on_oom = use;
  }
}

void* CudaPools::from_last_resort(const Context& context, std::size_t bytes, StreamId stream) {
  const cudaStream_t handle = handle_of(stream);
  const auto own = std::this_thread::get_id();
  const Lock lock(mutex_);
  for (const auto& [key, pool] : pools_) {
    const auto& [device, id] = key;
    const bool is_begun = std::any_of(begun_pools_.begin(), begun_pools_.end(),
                                      [&](const Begun& begun) { return begun.key == key; });
    if (!pool.use_on_oom || !pool.provider || is_begun) continue;
    if (&pool.provider->device() != &context.device()) continue;
    if (!has_free_block(*native_, id, bytes, handle)) continue;
    native_->beginAllocateToPool(device, id,
                                 [own](cudaStream_t) { return std::this_thread::get_id() == own; });
    void* pointer = nullptr;
    try {
      pointer = native_->raw_alloc_with_stream(bytes, handle);
    } catch (const c10::Error&) {
      // Somebody else took the block.
    }
    native_->endAllocateToPool(device, id);
    native_->releasePool(device, id);
    if (pointer == nullptr) continue;
    if (AddressTable::segment_owner_of(pointer) == &context) return pointer;
    native_->raw_delete(pointer);
  }
  return nullptr;
}

}  // namespace pgk
