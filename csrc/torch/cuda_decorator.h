// The decorator of torch's native allocator: which requests are a context's, and what is asked
// before one is refused.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/address_table.h"
#include "core/error.h"
#include "core/manager.h"
#include "core/scope_exit.h"
#include "core/session.h"
#include "torch/cuda_forwarder.h"
#include "torch/cuda_pools.h"
#include "torch/cuda_report.h"
#include "torch/cuda_statistics.h"
#include "torch/cuda_streams.h"
#include "torch/cuda_workspaces.h"

namespace pgk {

class CudaDecorator final : public CudaForwarder {
 public:
  // One in a process: deleters know no other.
  explicit CudaDecorator(caching::CUDAAllocator* native) : CudaForwarder(native), pools_(native) {
    decorated_ = native;
  }

  void serve(const std::shared_ptr<Manager>& manager) {
    const std::lock_guard lock(mutex_);
    manager_ = manager;
    served_device_.store(manager ? ordinal_of(*manager) : -1, std::memory_order_relaxed);
    served_.store(manager ? manager->thread_streams() : nullptr, std::memory_order_release);
    statistics_.watch(manager);
    if (!manager) return;
    workspace_bytes_ = CudaWorkspaces::bytes_each();
    manager->set_reliefs(reliefs());
  }
  CudaPools& pools() { return pools_; }
  void drop_workspaces_of(const Context& context) const {
    if (!pools_.has_captured(context)) CudaWorkspaces::drop_all(context);
  }
  // The calling thread leaves a session on this stream, still its current one.
  void leave(StreamId stream) const {
    const auto context = CudaWorkspaces::take_short_of_memory(stream);
    if (!context || pools_.has_captured(*context)) return;
    try {
      CudaWorkspaces::drop_own(*context);
    } catch (const std::exception&) {
      // A thread without a handle has no workspace.
    }
  }
  // Of those that are gone, once no graph may hold one any more.
  void drop_workspaces_of(const std::vector<std::shared_ptr<Context>>& contexts) const {
    for (const auto& context : contexts) {
      if (context->is_destroyed()) drop_workspaces_of(*context);
    }
  }

  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::DeviceIndex device = current_device();
    if (bytes != 0) [[likely]] {
      if (void* pointer = from_context(device, current_stream(device), bytes)) {
        if (bytes == workspace_bytes_.load(std::memory_order_relaxed)) [[unlikely]]
          note_workspace(device);
        return {pointer, pointer, &delete_block, c10::Device(c10::DeviceType::CUDA, device)};
      }
    }
    return taken_over(
        from_native(current_stream(device), bytes, [=, this] { return native_->allocate(bytes); }));
  }

  // Native's own memory, whatever session the calling thread is in.
  c10::DataPtr allocate_outside(std::size_t bytes) {
    return taken_over(from_native(current_stream(current_device()), bytes,
                                  [=, this] { return native_->allocate(bytes); }));
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
    // What torch did not allocate is nobody's business.
    const c10::DeleterFnPtr deleter = data.get_deleter();
    if (deleter != &delete_block && deleter != native_->raw_deleter()) return;
    // Native has divided a segment; that it moves is still the context's business.
    if (Context* owner = AddressTable::segment_owner_of(pointer)) {
      owner->record_use(pointer, CudaDevice::id_of(stream.stream()));
    }
    // Native looks at the deleter to tell whether the block is its own.
    c10::DataPtr alias(pointer, pointer, native_->raw_deleter(), data.device());
    const ScopeExit keep_block([&] { alias.release_context(); });
    native_->recordStream(alias, stream);
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
    pools_.begin(device, id, std::move(filter), context_of_session(device), served(device));
  }
  void endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t id) override {
    pools_.end(device, id);
  }
  void releasePool(c10::DeviceIndex device, c10::MempoolId_t id) override {
    drop_workspaces_of(pools_.release(device, id));
    pools_.empty_released();
  }
  void createOrIncrefPool(c10::DeviceIndex device, c10::MempoolId_t id,
                          std::shared_ptr<caching::CUDAAllocator> allocator) override {
    pools_.create(device, id, std::move(allocator), served(device));
  }
  void setUseOnOOM(c10::DeviceIndex device, c10::MempoolId_t id, bool use) override {
    pools_.set_use_on_oom(device, id, use);
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
    if (id != c10::MempoolId_t{0, 0}) {
      // For a MemPool that goes, whose destructor must not throw. Native refuses while anybody
      // allocates to a pool; then what it keeps comes back later.
      try {
        native_->emptyCache(id);
      } catch (const c10::Error&) {
      }
      return;
    }
    native_->emptyCache(id);
    if (const auto manager = this->manager()) manager->trim();
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
    if (owner == nullptr) owner = AddressTable::segment_owner_of(pointer);
    TORCH_CHECK(owner == nullptr, "memory of context '", owner ? owner->name() : "",
                "' cannot be shared with other processes, since it may move: send a copy, "
                "pygpukit_torch.share(tensor)");
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
  // The one deleter of every pointer that leaves the decorator, since graph trees compare deleters
  // with raw_deleter(): the address tells whose the pointer is.
  static void delete_block(void* pointer);
  static void take_over(c10::DataPtr& data);

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
  std::shared_ptr<CudaDevice> served(c10::DeviceIndex device) const {
    const auto manager = serves(device) ? this->manager() : nullptr;
    return manager ? std::static_pointer_cast<CudaDevice>(manager->device()) : nullptr;
  }
  bool serves(const Context& context, c10::DeviceIndex device) const {
    return context.thread_streams() == served_.load(std::memory_order_acquire) &&
           device == served_device_.load(std::memory_order_relaxed);
  }
  std::shared_ptr<Context> context_of_session(c10::DeviceIndex device) const {
    Context* context = current_context();
    return context != nullptr && serves(*context, device) ? context->shared_from_this() : nullptr;
  }

  void note_workspace(c10::DeviceIndex device) const {
    const auto context = context_of_session(device);
    if (context && context->stream() == current_cuda_stream(device)) CudaWorkspaces::note(context);
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
    if (pools_.takes(*context, stream, /*in_session=*/kept == nullptr)) [[unlikely]]
      return nullptr;
    if (stream != context->stream()) [[unlikely]]
      note_use(stream, context->shared_from_this());
    void* pointer = nullptr;
    try {
      pointer = context->allocate_resident(bytes, stream);
      if (pointer == nullptr) [[unlikely]] {
        std::string said;
        pointer = context->try_allocate(bytes, stream, Effort::evict, &said);  // asks reliefs()
        if (pointer == nullptr) {
          if (void* spare = pools_.from_last_resort(*context, bytes, stream)) return spare;
          refuse(*context, bytes, said);
        }
      }
    } catch (const Error& error) {
      // Of a session that let its context be destroyed.
      if (error.code() == ErrorCode::context_destroyed) return nullptr;
      TORCH_CHECK_WITH(OutOfMemoryError, error.code() != ErrorCode::out_of_memory, error.what());
      throw;
    }
    report(*context, pointer, /*allocated=*/true);
    return pointer;
  }

  std::vector<Reliefs::Relief> reliefs();
  bool native_caches(c10::DeviceIndex device) const;
  [[noreturn]] void refuse(Context& context, std::size_t bytes, const std::string& said);
  // Whether it is worth to ask native once more for `bytes` that it could not serve.
  bool make_room_for_native(StreamId stream, std::size_t bytes);

  template <typename Request>
  std::invoke_result_t<Request> from_native(StreamId stream, std::size_t bytes,
                                            const Request& request) {
    if (CudaPools::in_use() || pools_.has_last_resorts()) [[unlikely]] {
      // It may be a pool of a context that serves it.
      if (const auto manager = this->manager()) manager->device()->announce(stream);
    }
    // Another thread may get the room first.
    for (int tries = kTries;; --tries) {
      try {
        return request();
      } catch (const c10::OutOfMemoryError&) {
        if (tries == 1 || !make_room_for_native(stream, bytes)) throw;
      }
    }
  }

  static constexpr int kTries = 4;
  static inline caching::CUDAAllocator* decorated_ = nullptr;

  CudaPools pools_;
  std::atomic<std::size_t> workspace_bytes_{0};  // once it serves somebody
  CudaStatistics statistics_;
  mutable std::mutex mutex_;
  std::weak_ptr<Manager> manager_;
  std::atomic<ThreadStreams*> served_{nullptr};
  std::atomic<c10::DeviceIndex> served_device_{-1};  // -1: none, whatever else matches
  std::vector<caching::OutOfMemoryObserver> oom_observers_;
};

}  // namespace pgk
