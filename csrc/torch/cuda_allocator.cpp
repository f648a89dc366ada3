#include "torch/cuda_allocator.h"

#include <c10/cuda/CUDAFunctions.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "core/address_table.h"
#include "torch/cuda_forwarder.h"
#include "torch/cuda_pools.h"
#include "torch/cuda_report.h"
#include "torch/cuda_statistics.h"
#include "torch/cuda_streams.h"

namespace pgk {
namespace {

using Native = caching::CUDAAllocator;

Native* native_allocator = nullptr;

// The one deleter of every pointer that leaves the decorator, since graph trees compare deleters
// with raw_deleter(): the address tells whose the pointer is.
void delete_block(void* pointer) {
  Context* owner = AddressTable::owner_of(pointer);
  if (owner == nullptr) {
    native_allocator->raw_delete(pointer);
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

void take_over(c10::DataPtr& data) {
  // Fails only for a pointer that does not come from plain allocation; it keeps its deleter.
  std::ignore = data.compare_exchange_deleter(native_allocator->raw_deleter(), &delete_block);
}

class CudaAllocator final : public CudaForwarder {
 public:
  explicit CudaAllocator(Native* native) : CudaForwarder(native), pools_(native) {}

  void serve(const std::shared_ptr<Manager>& manager) {
    const std::lock_guard lock(mutex_);
    manager_ = manager;
    served_device_.store(manager ? ordinal_of(*manager) : -1, std::memory_order_relaxed);
    served_.store(manager ? manager->thread_streams() : nullptr, std::memory_order_release);
    statistics_.watch(manager);
  }
  const CudaPools& pools() const { return pools_; }

  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::DeviceIndex device = current_device();
    if (bytes != 0) [[likely]] {
      if (void* pointer = from_context(device, current_stream(device), bytes)) {
        return {pointer, pointer, &delete_block, c10::Device(c10::DeviceType::CUDA, device)};
      }
    }
    return taken_over(
        from_native(current_stream(device), bytes, [=, this] { return native_->allocate(bytes); }));
  }

  void* raw_alloc(std::size_t bytes) override {
    const c10::DeviceIndex device = current_device();
    return raw_alloc_with_stream(bytes, handle_of(current_stream(device)));
  }

  void* raw_alloc_with_stream(std::size_t bytes, cudaStream_t stream) override {
    if (bytes == 0) return nullptr;
    const StreamId id = CudaDevice::id_of(stream);
    if (void* pointer = from_context(current_device(), id, bytes)) return pointer;
    return from_native(id, bytes,
                       [=, this] { return native_->raw_alloc_with_stream(bytes, stream); });
  }

  void raw_delete(void* pointer) override {
    if (pointer != nullptr) delete_block(pointer);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &delete_block; }

  void recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) override {
    void* pointer = data.get();
    if (pointer == nullptr) return;
    if (Context* owner = AddressTable::owner_of(pointer)) {
      owner->record_use(pointer, CudaDevice::id_of(stream.stream()));
      return;
    }
    // Native has divided a segment; that it moves is still the context's business.
    if (Context* owner = AddressTable::segment_owner_of(pointer)) {
      owner->record_use(pointer, CudaDevice::id_of(stream.stream()));
    }
    // Native looks at the deleter to tell whether the block is its own.
    c10::DataPtr alias(pointer, pointer, native_->raw_deleter(), data.device());
    native_->recordStream(alias, stream);
    alias.release_context();
  }

  cudaError_t memcpyAsync(void* destination, int destination_device, const void* source,
                          int source_device, std::size_t bytes, cudaStream_t stream,
                          bool p2p_enabled) override {
    const Context* owner = AddressTable::owner_of(destination);
    if (owner == nullptr) owner = AddressTable::owner_of(source);
    if (owner == nullptr || destination_device == source_device) {
      return native_->memcpyAsync(destination, destination_device, source, source_device, bytes,
                                  stream, p2p_enabled);
    }
    cuda_device(*owner).copy_between(reinterpret_cast<Address>(destination), destination_device,
                                     reinterpret_cast<Address>(source), source_device, bytes,
                                     CudaDevice::id_of(stream));
    return cudaSuccess;
  }

  void beginAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t id,
                           std::function<bool(cudaStream_t)> filter) override {
    mend_stream();
    const auto manager = serves(device) ? this->manager() : nullptr;
    const auto served = manager ? std::static_pointer_cast<CudaDevice>(manager->device()) : nullptr;
    pools_.begin(device, id, std::move(filter), context_of_session(device), served);
  }
  void endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t id) override {
    pools_.end(device, id);
  }
  void releasePool(c10::DeviceIndex device, c10::MempoolId_t id) override {
    pools_.release(device, id);
  }
  void createOrIncrefPool(c10::DeviceIndex device, c10::MempoolId_t id,
                          std::shared_ptr<Native> allocator) override {
    pools_.create(device, id, std::move(allocator), context_of_session(device));
  }
  caching::CheckpointDelta setCheckpointPoolState(
      c10::DeviceIndex device, std::shared_ptr<caching::AllocatorState> state) override {
    caching::CheckpointDelta delta = native_->setCheckpointPoolState(device, std::move(state));
    for (c10::DataPtr& data : delta.dataptrs_allocd) take_over(data);
    return delta;
  }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    auto stats = native_->getDeviceStats(device);
    if (serves(device)) statistics_.add_to(stats);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    native_->resetAccumulatedStats(device);
    if (serves(device)) statistics_.reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    native_->resetPeakStats(device);
    if (!serves(device)) return;
    if (const auto manager = this->manager()) manager->reset_peaks();
  }
  void emptyCache(c10::MempoolId_t id) override {
    pools_.empty_released();
    native_->emptyCache(id);
    const auto manager = this->manager();
    if (manager && id == c10::MempoolId_t{0, 0}) manager->trim();
  }
  void cacheInfo(c10::DeviceIndex device, std::size_t* largest) override {
    native_->cacheInfo(device, largest);
    if (const auto context = context_of_session(device)) {
      *largest = context->manager()->usage(*context).available;
    }
  }
  void* getBaseAllocation(void* pointer, std::size_t* size) override {
    const Context* owner = AddressTable::owner_of(pointer);
    if (owner == nullptr) return native_->getBaseAllocation(pointer, size);
    if (size != nullptr) *size = owner->block_bytes(pointer);
    return pointer;
  }
  caching::ShareableHandle shareIpcHandle(void* pointer) override {
    const Context* owner = AddressTable::owner_of(pointer);
    TORCH_CHECK(owner == nullptr, "memory of context '", owner ? owner->name() : "",
                "' cannot be shared with other processes; clone the tensor outside of sessions");
    return native_->shareIpcHandle(pointer);
  }
  void attachOutOfMemoryObserver(caching::OutOfMemoryObserver observer) override {
    {
      const std::lock_guard lock(mutex_);
      oom_observers_.push_back(observer);
    }
    native_->attachOutOfMemoryObserver(std::move(observer));
  }
  std::string name() override { return "pygpukit_torch"; }

 private:
  c10::DataPtr taken_over(c10::DataPtr data) const override {
    take_over(data);
    return data;
  }

  // cudaGetDevice() takes a lock that all threads share: eight of them allocated 20 times slower.
  static c10::DeviceIndex current_device() {
    static const bool is_alone = c10::cuda::device_count() == 1;
    if (is_alone) return 0;
    const Context* context = current_context();
    if (context != nullptr && !context->is_on_host()) {
      const CudaDevice& device = cuda_device(*context);
      if (device.is_current()) return static_cast<c10::DeviceIndex>(device.ordinal());
    }
    return c10::cuda::current_device();
  }

  static c10::DeviceIndex ordinal_of(const Manager& manager) {
    return static_cast<c10::DeviceIndex>(static_cast<CudaDevice&>(*manager.device()).ordinal());
  }

  static StreamId current_stream(c10::DeviceIndex device) {
    mend_stream();
    return current_cuda_stream(device);
  }

  std::shared_ptr<Manager> manager() const {
    const std::lock_guard lock(mutex_);
    return manager_.lock();
  }
  bool serves(c10::DeviceIndex device) const {
    const auto manager = this->manager();
    return manager && ordinal_of(*manager) == device;
  }
  bool serves(const Context& context, c10::DeviceIndex device) const {
    return context.thread_streams() == served_.load(std::memory_order_acquire) &&
           device == served_device_.load(std::memory_order_relaxed);
  }
  std::shared_ptr<Context> context_of_session(c10::DeviceIndex device) const {
    Context* context = current_context();
    return context != nullptr && serves(*context, device) ? context->shared_from_this() : nullptr;
  }

  // Null if the request is native's: outside of sessions, and for private pools.
  void* from_context(c10::DeviceIndex device, StreamId stream, std::size_t bytes) {
    Context* context = current_context();
    std::shared_ptr<Context> kept;
    if (context == nullptr) {
      kept = context_of_work(stream);
      context = kept.get();
    }
    if (context == nullptr || !serves(*context, device)) return nullptr;
    if (pools_.takes(handle_of(stream))) [[unlikely]]
      return nullptr;
    if (stream != context->stream()) [[unlikely]]
      note_use(stream, context->shared_from_this());
    void* pointer = nullptr;
    try {
      pointer = context->allocate_resident(bytes, stream);
      if (pointer == nullptr) [[unlikely]]
        pointer = with_effort(*context, bytes, stream);
    } catch (const Error& error) {
      // Of a session that let its context be destroyed.
      if (error.code() == ErrorCode::context_destroyed) return nullptr;
      TORCH_CHECK_WITH(OutOfMemoryError, error.code() != ErrorCode::out_of_memory, error.what());
      throw;
    }
    report(*context, pointer, /*allocated=*/true);
    return pointer;
  }

  // Does what native does before it gives up, as far as that can help a context; then others have
  // to give way.
  [[gnu::noinline]] void* with_effort(Context& context, std::size_t bytes, StreamId stream) {
    std::string said;
    const auto attempt = [&](Effort effort) {
      return context.try_allocate(bytes, stream, effort, &said);
    };
    if (void* pointer = attempt(Effort::wait)) return pointer;
    bool freed = false;
    for (const auto& name : c10::FreeCudaMemoryCallbacksRegistry()->Keys()) {
      freed |= c10::FreeCudaMemoryCallbacksRegistry()->Create(name)->Execute();
    }
    freed |= pools_.empty_released();
    if (freed) {
      if (void* pointer = attempt(Effort::wait)) return pointer;
    }
    if (!said.empty() && !pools_.in_use() && native_caches(context)) {
      native_->emptyCache({0, 0});
    }
    if (void* pointer = attempt(Effort::evict)) return pointer;
    refuse(context, bytes, said);
  }

  bool native_caches(const Context& context) const {
    const auto stats = native_->getDeviceStats(torch_device(context).index());
    return stats.reserved_bytes[0].current > stats.allocated_bytes[0].current;
  }

  [[noreturn]] void refuse(Context& context, std::size_t bytes, const std::string& said) {
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
    context.manager()->refuse(context, bytes, said);
  }

  // Makes room and asks native once more where that may help.
  template <typename Request>
  std::invoke_result_t<Request> from_native(StreamId stream, std::size_t bytes,
                                            const Request& request) {
    if (CudaPools::in_use()) [[unlikely]] {
      // It may be a pool of a context that serves it.
      if (const auto manager = this->manager()) manager->device()->announce(stream);
    }
    std::shared_ptr<Context> provider;
    try {
      return request();
    } catch (const c10::OutOfMemoryError&) {
      provider = pools_.provider_of(handle_of(stream));
      const auto manager = this->manager();
      if (!provider && (!manager || !manager->give_way(bytes))) throw;
    }
    if (!provider) return request();
    // What a capture needs cannot wait for its end, whichever thread asks.
    std::optional<CudaDevice::BesideCapture> beside;
    if (provider->device().is_capturing(stream)) beside.emplace();
    // The provider does not wait under native's lock. This does, and leaves what it got for it.
    const std::size_t segment = segment_bytes_for(bytes);
    try {
      std::string said;
      void* room = provider->try_allocate(segment, kNoStream, Effort::evict, &said);
      if (room == nullptr) refuse(*provider, segment, said);
      provider->free(room);
    } catch (const Error& error) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
    }
    return request();
  }

  CudaPools pools_;
  CudaStatistics statistics_;
  mutable std::mutex mutex_;
  std::weak_ptr<Manager> manager_;
  std::atomic<ThreadStreams*> served_{nullptr};
  std::atomic<c10::DeviceIndex> served_device_{-1};  // -1: none, whatever else matches
  std::vector<caching::OutOfMemoryObserver> oom_observers_;
};

std::shared_ptr<CudaAllocator> instance;

}  // namespace

std::shared_ptr<Native> cuda_allocator() {
  Native* current = caching::get();
  if (current != nullptr && current == instance.get()) return instance;
  const std::string name = current == nullptr ? "none" : current->name();
  if (name != "native" || (instance && current != native_allocator)) {
    throw Error(ErrorCode::invalid_value,
                "torch's CUDA allocator is '" + name +
                    "', but only its native one can serve contexts: check PYTORCH_ALLOC_CONF and "
                    "whoever else replaces the allocator");
  }
  if (!instance) {
    native_allocator = current;
    // Leaked: blocks are freed after static destructors have run.
    instance = *new std::shared_ptr<CudaAllocator>(std::make_shared<CudaAllocator>(current));
  }
  return instance;
}

void install_cuda_allocator() {
  caching::allocator.store(cuda_allocator().get());
  // What torch.accelerator and Storage ask for; a priority of 0 would be ignored.
  c10::SetAllocator(c10::DeviceType::CUDA, instance.get(), 1);
}

void uninstall_cuda_allocator() {
  if (!instance || caching::get() != instance.get()) return;
  instance->serve(nullptr);
  caching::allocator.store(native_allocator);
  c10::SetAllocator(c10::DeviceType::CUDA, native_allocator, 1);
}

void serve_contexts_of(const std::shared_ptr<Manager>& manager) {
  instance->serve(manager);
}

bool has_cuda_pools() {
  return instance && instance->pools().any();
}

}  // namespace pgk
