// What private pools keep and have not handed out.
#include <algorithm>
#include <thread>

#include "core/address_table.h"
#include "core/blocking.h"
#include "core/scope_exit.h"
#include "torch/cuda_pools.h"
#include "torch/cuda_streams.h"

namespace pgk {
namespace {

using Lock = std::lock_guard<std::recursive_mutex>;
using Native = CudaPools::Native;

// Whether native would serve the stream's request without another segment.
bool has_free_block(Native& native, CudaPools::Id id, std::size_t bytes, cudaStream_t stream) {
  const bool is_large = segment_bytes_for(bytes) > segment_bytes_for(1);
  const auto snapshot = native.snapshot(id, /*include_traces=*/false);
  return std::any_of(snapshot.segments.begin(), snapshot.segments.end(), [&](const auto& segment) {
    return segment.stream == stream && segment.is_large == is_large &&
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
  const auto pool = pools_.find({device, id});
  if (pool == pools_.end() || pool->second.use_on_oom == use) return;
  pool->second.use_on_oom = use;
  last_resorts_ += use ? 1 : -1;
}

std::unique_lock<std::recursive_mutex> CudaPools::wait_for_last_resort() const {
  std::unique_lock turn(last_resort_, std::try_to_lock);
  if (!turn.owns_lock()) {
    const Blocking blocking;
    turn.lock();
  }
  return turn;
}

// With a reference each, so that they stay.
std::vector<CudaPools::Key> CudaPools::last_resorts(const Context& context) {
  std::vector<Key> keys;
  const Lock lock(mutex_);
  for (const auto& [key, pool] : pools_) {
    if (!pool.use_on_oom || !pool.provider || is_begun(key)) continue;
    if (&pool.provider->device() != &context.device()) continue;
    keys.push_back(key);
    native_->createOrIncrefPool(key.first, key.second, nullptr);
  }
  return keys;
}

// Native may run Python here, of who records history or watches for OOM: so not under our lock.
void* CudaPools::from_last_resort(const Context& context, std::size_t bytes, StreamId stream) {
  if (!has_last_resorts()) return nullptr;
  const Blocking blocking;
  const Lock turn(last_resort_);
  const cudaStream_t handle = handle_of(stream);
  const auto own = std::this_thread::get_id();
  void* found = nullptr;
  for (const auto& [device, id] : last_resorts(context)) {
    if (found == nullptr && has_free_block(*native_, id, bytes, handle)) {
      void* pointer = nullptr;
      try {
        native_->beginAllocateToPool(
            device, id, [own](cudaStream_t) { return std::this_thread::get_id() == own; });
        const ScopeExit end([&, device = device, id = id] {
          native_->endAllocateToPool(device, id);
          native_->releasePool(device, id);
        });
        pointer = native_->raw_alloc_with_stream(bytes, handle);
      } catch (const c10::Error&) {
        // Somebody else took the block.
      }
      if (pointer != nullptr && AddressTable::segment_owner_of(pointer) != &context) {
        native_->raw_delete(pointer);
      } else {
        found = pointer;
      }
    }
    native_->releasePool(device, id);
  }
  return found;
}

}  // namespace pgk
