#include "torch/cuda_pools.h"

#include <torch/csrc/cuda/CUDAPluggableAllocator.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "core/address_table.h"
#include "core/blocking.h"
#include "core/error.h"
#include "core/session.h"
#include "torch/cuda_streams.h"

namespace pgk {
namespace {

using Pluggable = torch::cuda::CUDAPluggableAllocator::CUDAPluggableAllocator;
using Lock = std::lock_guard<std::recursive_mutex>;

// The sizes of native's segments (c10/cuda/CUDACachingAllocator.cpp).
constexpr std::size_t kSmallRequest = MiB;
constexpr std::size_t kSmallSegment = 2 * MiB;
constexpr std::size_t kLargeRequest = 10 * MiB;
constexpr std::size_t kLargeSegment = 20 * MiB;

}  // namespace

void* take_segment(Context& context, std::size_t bytes) {
  void* pointer = nullptr;
  try {
    pointer = context.try_allocate(bytes, kNoStream, Effort::ready);
  } catch (const Error&) {
    return nullptr;  // a context that is no longer open provides nothing
  }
  if (pointer != nullptr) context.count_segment(pointer, /*taken=*/true);
  return pointer;
}

void give_back_segment(Context& context, void* pointer) {
  context.count_segment(pointer, /*taken=*/false);
  auto& device = static_cast<CudaDevice&>(context.device());
  try {
    if (!CudaPools::in_use()) {
      device.synchronize();
      context.free(pointer);
      return;
    }
  } catch (const Error&) {
    // A capture that torch does not know of.
  }
  std::vector<StreamId> streams = context.streams();
  streams.push_back(CudaDevice::kDefaultStream);
  streams.push_back(current_cuda_stream(device.ordinal()));
  std::sort(streams.begin(), streams.end());
  streams.erase(std::unique(streams.begin(), streams.end()), streams.end());
  context.free_after(pointer, streams);
}

std::size_t segment_bytes_for(std::size_t bytes) {
  if (bytes <= kSmallRequest) return kSmallSegment;
  if (bytes < kLargeRequest) return kLargeSegment;
  return round_up(bytes, kSmallSegment);
}

// What native takes a pool's segments from. Called under native's lock. The context is that of the
// thread that needs the segment, since a process's graph trees share one pool; without a session it
// is the one in which the pool was made.
class CudaPools::Provider final : public Pluggable {
 public:
  explicit Provider(std::shared_ptr<Context> context)
      : Pluggable([](std::size_t, int, cudaStream_t) -> void* { return nullptr; },
                  [](void*, std::size_t, int, cudaStream_t) {}),
        context_(std::move(context)) {}

  void* raw_alloc(std::size_t bytes) override {
    void* pointer = take_segment(provider(), bytes);
    if (pointer != nullptr) ++count_;
    return pointer;
  }
  void* raw_alloc_with_stream(std::size_t bytes, cudaStream_t /*stream*/) override {
    return raw_alloc(bytes);
  }
  void raw_delete(void* pointer) override {
    --count_;
    give_back_segment(*AddressTable::segment_owner_of(pointer), pointer);
  }
  std::string name() override { return "pygpukit_torch segments of " + context_->name(); }

  std::size_t count() const { return count_; }
  // What native's cudaFree would do under its lock, ahead of it: graphs may still be replaying.
  void finish_work() const {
    const Blocking blocking;
    static_cast<CudaDevice&>(context_->device()).synchronize();
  }
  Context& provider() const {
    Context* current = current_context();
    return current != nullptr && current->thread_streams() == context_->thread_streams()
               ? *current
               : *context_;
  }

 private:
  std::shared_ptr<Context> context_;
  std::atomic<std::size_t> count_{0};
};

const CudaPools::Begun* CudaPools::find(cudaStream_t stream) const {
  const Lock lock(mutex_);
  // Native asks the latest first, too.
  const auto it = std::find_if(captures_.rbegin(), captures_.rend(),
                               [=](const Begun& begun) { return begun.filter(stream); });
  return it == captures_.rend() ? nullptr : &*it;
}

std::shared_ptr<Context> CudaPools::provider_of(cudaStream_t stream) const {
  const Lock lock(mutex_);
  const Begun* begun = find(stream);
  if (begun == nullptr) return nullptr;
  const auto bound = bound_.find(begun->id);
  return bound == bound_.end() ? nullptr : bound->second.provider->provider().shared_from_this();
}

// 0 also for a pool that does not exist, which native only tells by an error.
int CudaPools::use_count(c10::DeviceIndex device, c10::MempoolId_t id) const {
  try {
    return native_->getPoolUseCount(device, id);
  } catch (const c10::Error&) {
    return 0;
  }
}

bool CudaPools::any() const {
  const Lock lock(mutex_);
  return !references_.empty();
}

CudaPools::Capture::Capture(std::shared_ptr<CudaDevice> on, StreamId stream)
    : device(std::move(on)), stream(stream) {
  const Blocking blocking;
  device->begin_capture(stream);
}

void CudaPools::begin(c10::DeviceIndex device, c10::MempoolId_t id, Filter filter,
                      const std::shared_ptr<Context>& context,
                      const std::shared_ptr<CudaDevice>& served) {
  // A MemPool takes whatever its thread or stream asks for; a capture takes nothing yet, since it
  // only begins after this.
  const StreamId stream = current_cuda_stream(device);
  std::shared_ptr<Capture> capture;
  if (served && !filter(handle_of(stream))) capture = std::make_shared<Capture>(served, stream);
  const Lock lock(mutex_);
  if (context && !bound_.contains(id) && use_count(device, id) == 0) {
    const auto provider = std::make_shared<Provider>(context);
    native_->createOrIncrefPool(device, id, provider);
    bound_[id] = {provider, true};
  }
  native_->beginAllocateToPool(device, id, filter);
  ++references_[id];
  captures_.push_back({id, std::move(filter), std::move(capture)});
  ++begun_;
}

void CudaPools::end(c10::DeviceIndex device, c10::MempoolId_t id) {
  const Lock lock(mutex_);
  native_->endAllocateToPool(device, id);
  begun_ -= static_cast<int>(
      std::erase_if(captures_, [&](const Begun& entry) { return entry.id == id; }));
}

void CudaPools::create(c10::DeviceIndex device, c10::MempoolId_t id,
                       std::shared_ptr<Native> allocator, const std::shared_ptr<Context>& context) {
  const Lock lock(mutex_);
  if (context && !allocator && !bound_.contains(id) && use_count(device, id) == 0) {
    const auto provider = std::make_shared<Provider>(context);
    native_->createOrIncrefPool(device, id, provider);
    bound_[id] = {provider, false};
  } else {
    native_->createOrIncrefPool(device, id, std::move(allocator));
  }
  ++references_[id];
}

void CudaPools::release(c10::DeviceIndex device, c10::MempoolId_t id) {
  {
    const Lock lock(mutex_);
    native_->releasePool(device, id);
    if (const auto entry = references_.find(id); entry != references_.end()) {
      if (--entry->second == 0) references_.erase(entry);
    }
    const auto bound = bound_.find(id);
    if (bound == bound_.end()) return;
    const int own = bound->second.has_own_reference ? 1 : 0;
    if (use_count(device, id) > own) return;
    if (own != 0) native_->releasePool(device, id);
    released_.push_back({id, bound->second.provider});
    bound_.erase(bound);
  }
  empty_released();
}

bool CudaPools::empty_released() {
  std::vector<Released> released;
  {
    const Lock lock(mutex_);
    // Native synchronizes here, which it refuses to do during a capture.
    if (released_.empty() || in_use()) return false;
    released.swap(released_);
  }
  std::erase_if(released, [this](const Released& pool) {
    try {
      pool.provider->finish_work();
      native_->emptyCache(pool.id);
    } catch (const std::exception&) {
      return false;  // a capture began meanwhile
    }
    // Live tensors keep segments; they are asked for again later.
    return pool.provider->count() == 0;
  });
  const Lock lock(mutex_);
  released_.insert(released_.end(), released.begin(), released.end());
  return true;
}

}  // namespace pgk
