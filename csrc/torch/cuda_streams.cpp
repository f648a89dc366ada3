#include "torch/cuda_streams.h"

#include <ATen/ThreadLocalPythonObjects.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/graph_task.h>

#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "torch/cuda_allocator.h"
#include "torch/cuda_workspaces.h"
#include "torch/operator_gate.h"

namespace pgk {
namespace {

using c10::cuda::CUDAStream;

StreamId id_of(const CUDAStream& stream) {
  // Torch's id of a stream that it did not make is the handle: the common case needs no call.
  const Context* context = current_context();
  const auto id = static_cast<StreamId>(stream.id());
  if (context != nullptr && !context->is_on_host() && context->stream() == id) return id;
  return CudaDevice::id_of(stream.stream());
}

// Backward ----------------------------------------------------------------------------------------

// The engine hands a copy of the caller's thread-local objects to its workers. Ours carries the
// caller's context; it has no Python object.
struct CallersContext : c10::SafePyObject {
  explicit CallersContext(std::shared_ptr<Context> context)
      : SafePyObject(nullptr, nullptr), context(std::move(context)) {}
  std::shared_ptr<Context> context;
};

const std::string& tls_key() {
  static const std::string key = "pygpukit_torch.context";
  return key;
}

void set_callers_context(const std::shared_ptr<Context>& context) {
  std::shared_ptr<c10::SafePyObject> object;
  if (context) object = std::make_shared<CallersContext>(context);
  at::impl::ThreadLocalPythonObjects::set(tls_key(), std::move(object));
}

bool in_backward() {
  return torch::autograd::get_current_graph_task_id() != -1;
}

std::shared_ptr<Context> callers_context() {
  using Objects = at::impl::ThreadLocalPythonObjects;
  if (!Objects::contains(tls_key())) return nullptr;
  const auto& object = Objects::get(tls_key());
  return object ? static_cast<CallersContext&>(*object).context : nullptr;
}

// Streams -----------------------------------------------------------------------------------------

struct Use {
  std::weak_ptr<Context> context;
  bool owned = false;
};

class StreamTable {
 public:
  void set(StreamId stream, const std::shared_ptr<Context>& context, bool owned) {
    {
      const std::shared_lock lock(mutex_);
      const auto known = uses_.find(stream);
      if (known != uses_.end() && known->second.owned == owned &&
          !known->second.context.owner_before(context) &&
          !context.owner_before(known->second.context)) {
        return;
      }
    }
    const std::unique_lock lock(mutex_);
    Use& use = uses_[stream];
    // A context's own stream is its own, whoever else submits work to it.
    if (use.owned && !owned && use.context.lock()) return;
    use = {context, owned};
    generation_.fetch_add(1, std::memory_order_release);
  }

  Use get(StreamId stream) const {
    thread_local struct {
      std::uint64_t generation = 0;
      StreamId stream = kNoStream;
      Use use;
    } last;
    const std::uint64_t generation = generation_.load(std::memory_order_acquire);
    if (last.stream != stream || last.generation != generation) {
      const std::shared_lock lock(mutex_);
      const auto known = uses_.find(stream);
      last.use = known == uses_.end() ? Use{} : known->second;
      last.stream = stream;
      last.generation = generation;
    }
    return last.use;
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<StreamId, Use> uses_;
  std::atomic<std::uint64_t> generation_{1};
};

StreamTable& stream_table() {
  static auto* table = new StreamTable;  // threads may outlive static destructors
  return *table;
}

std::shared_ptr<Context> if_open(std::shared_ptr<Context> context) {
  return context && context->is_open() ? context : nullptr;
}

// Sessions ----------------------------------------------------------------------------------------

class CudaStreams final : public ThreadStreams {
 public:
  explicit CudaStreams(const std::shared_ptr<CudaDevice>& device)
      : index_(static_cast<c10::DeviceIndex>(device->ordinal())) {}

  StreamId current() override { return id_of(c10::cuda::getCurrentCUDAStream(index_)); }

  std::shared_ptr<Context> context() override {
    Context* context = current_context();
    return context == nullptr ? context_of_work(current()) : context->shared_from_this();
  }

  Saved enter(const std::shared_ptr<Context>& context) override {
    const CUDAStream before = c10::cuda::getCurrentCUDAStream(index_);
    const StreamId inside = context->stream();
    // A session may outlive a context that it does not keep active.
    if (inside != kNoStream && id_of(before) != inside) {
      c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromExternal(handle_of(inside), index_));
      stream_table().set(inside, context, true);
    }
    set_callers_context(context);
    gate_operators(*this, context.get());
    return before.id();
  }

  void leave(Saved saved, const std::shared_ptr<Context>& outer) override {
    if (CudaWorkspaces::has_noted()) [[unlikely]]
      leave_workspaces(current());
    c10::cuda::setCurrentCUDAStream(CUDAStream::unpack3(saved, index_, c10::DeviceType::CUDA));
    set_callers_context(outer);
    gate_operators(*this, outer.get());
  }

 private:
  c10::DeviceIndex index_;
};

}  // namespace

ThreadStreams* cuda_streams(const std::shared_ptr<CudaDevice>& device) {
  static std::mutex mutex;
  static auto* all = new std::map<std::shared_ptr<CudaDevice>, CudaStreams>;
  const std::lock_guard lock(mutex);
  return &all->try_emplace(device, device).first->second;
}

StreamId current_cuda_stream(int ordinal) {
  return id_of(c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(ordinal)));
}

std::shared_ptr<Context> context_of_work(StreamId stream) {
  const Use use = stream == CudaDevice::kDefaultStream ? Use{} : stream_table().get(stream);
  if (use.owned) {
    if (auto owner = if_open(use.context.lock())) return owner;
  }
  // Torch hands its few pooled streams to everybody in turn, so elsewhere they tell nothing.
  if (!in_backward()) return nullptr;
  if (auto caller = if_open(callers_context())) return caller;
  return if_open(use.context.lock());
}

void note_use(StreamId stream, const std::shared_ptr<Context>& context) {
  if (stream != CudaDevice::kDefaultStream) stream_table().set(stream, context, false);
}

}  // namespace pgk
