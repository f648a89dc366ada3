#include "torch/cuda_decorator.h"

#include <optional>
#include <tuple>

namespace pgk {

void CudaDecorator::delete_block(void* pointer) {
  Context* owner = AddressTable::owner_of(pointer);
  if (owner == nullptr) {
    // Whoever frees part of a segment may have used it here.
    if (Context* provider = AddressTable::segment_owner_of(pointer)) {
      CudaDevice& device = cuda_device(*provider);
      device.announce(current_cuda_stream(device.ordinal()));
    }
    decorated_->raw_delete(pointer);
    return;
  }
  report(*owner, pointer, /*allocated=*/false);
  if (owner == current_context()) [[likely]] {
    owner->free(pointer);
  } else {
    // Whoever frees it here may have used it here, in another context or in none.
    const std::array streams{current_cuda_stream(cuda_device(*owner).ordinal())};
    owner->free_after(pointer, streams);
  }
}

void CudaDecorator::take_over(c10::DataPtr& data) {
  // Fails only for a pointer that does not come from plain allocation; it keeps its deleter.
  std::ignore = data.compare_exchange_deleter(decorated_->raw_deleter(), &delete_block);
}

// What torch has and can do without. The first is what native does before it gives up.
std::vector<Reliefs::Relief> CudaDecorator::reliefs() {
  const auto ask_callbacks = [](bool /*device_is_short*/) {
    bool freed = false;
    for (const auto& name : c10::FreeCudaMemoryCallbacksRegistry()->Keys()) {
      freed |= c10::FreeCudaMemoryCallbacksRegistry()->Create(name)->Execute();
    }
    return freed;
  };
  const auto empty_pools = [this](bool /*device_is_short*/) { return pools_.empty_released(); };
  const auto empty_cache = [this](bool device_is_short) {
    const auto device = served_device_.load(std::memory_order_relaxed);
    if (!device_is_short || CudaPools::in_use() || device < 0 || !native_caches(device)) {
      return false;
    }
    native_->emptyCache({0, 0});
    return true;
  };
  return {ask_callbacks, empty_pools, empty_cache};
}

bool CudaDecorator::native_caches(c10::DeviceIndex device) const {
  const auto stats = native_->getDeviceStats(device);
  return stats.reserved_bytes[0].current > stats.allocated_bytes[0].current;
}

void CudaDecorator::refuse(Context& context, std::size_t bytes, const std::string& said) {
  const c10::Device device = torch_device(context);
  c10::reportOutOfMemoryToProfiler(static_cast<std::int64_t>(bytes), context.used_bytes(),
                                   context.resident_bytes(), device);
  std::vector<caching::OutOfMemoryObserver> observers;
  {
    const std::lock_guard lock(mutex_);
    observers = oom_observers_;
  }
  for (const auto& observer : observers) {
    observer(device.index(), bytes, context.device().properties().capacity,
             context.device().free_bytes());
  }
  std::string why = said;
  if (const std::size_t unused = pools_.unused_bytes_of(context)) {
    why += (why.empty() ? "" : "; ") + format_bytes(unused) +
           " of its budget are free in private pools, which keep them until their CUDA graphs and "
           "MemPools are deleted";
  }
  context.manager()->refuse(context, bytes, why);
}

bool CudaDecorator::make_room_for_native(StreamId stream, std::size_t bytes) {
  const auto payer = pools_.payer_of(stream);
  if (!payer) {
    const auto manager = this->manager();
    return manager && manager->give_way(segment_bytes_for(bytes));
  }
  // What a capture needs cannot wait for its end, whichever thread asks.
  std::optional<CudaDevice::BesideCapture> beside;
  if (payer->device().is_capturing(stream)) beside.emplace();
  // The provider does not wait under native's lock. This does, and leaves what it got for it.
  const std::size_t segment = segment_bytes_for(bytes);
  try {
    std::string said;
    void* room = payer->try_allocate(segment, kNoStream, Effort::evict, &said);
    if (room == nullptr) refuse(*payer, segment, said);
    payer->free(room);
  } catch (const Error& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
  }
  return true;
}

}  // namespace pgk
