#include "torch/cuda_pools.h"

#include <ATen/core/CachingHostAllocator.h>

#include <algorithm>
#include <exception>

#include "core/blocking.h"
#include "core/error.h"
#include "core/scope_exit.h"
#include "core/session.h"
#include "torch/cuda_streams.h"

namespace pgk {
namespace {

using Lock = std::lock_guard<std::recursive_mutex>;
using Contexts = std::vector<std::shared_ptr<Context>>;

thread_local std::optional<CudaPools::Announced> announced;

// How many pools are begun for the calling thread alone. Another thread may end one.
struct OfThread {
  std::shared_ptr<std::atomic<int>> count = std::make_shared<std::atomic<int>>(0);
  OfThread();
  ~OfThread();
};
thread_local const std::atomic<int>* count_of_thread = nullptr;

OfThread::OfThread() {
  count_of_thread = count.get();
}

OfThread::~OfThread() {
  count_of_thread = nullptr;
}

// Native's, and the allocator of pinned memory, which has pools of the same ids.
template <typename Call>
void try_to(const Call& call) noexcept {
  try {
    call();
  } catch (const std::exception&) {
    // It did not come so far.
  }
}

}  // namespace

// Asking -----------------------------------------------------------------------------------------

bool CudaPools::is_threads() {
  return count_of_thread != nullptr && count_of_thread->load(std::memory_order_relaxed) != 0;
}

CudaPools::Mark CudaPools::mark_of_thread() {
  thread_local const OfThread own;
  return Mark(own.count);
}

CudaPools::Mark CudaPools::mark_of(const std::shared_ptr<Context>& context) {
  return Mark(std::shared_ptr<std::atomic<int>>(context, &context->begun_pools()));
}

const CudaPools::Begun* CudaPools::find(StreamId stream) const {
  const Lock lock(mutex_);
  // Native asks the latest first, too.
  const auto it = std::find_if(begun_pools_.rbegin(), begun_pools_.rend(),
                               [=](const Begun& begun) { return begun.filter(handle_of(stream)); });
  return it == begun_pools_.rend() ? nullptr : &*it;
}

std::shared_ptr<Context> CudaPools::payer_of(StreamId stream) const {
  const Lock lock(mutex_);
  const Begun* begun = find(stream);
  const auto pool = begun == nullptr ? pools_.end() : pools_.find(begun->key);
  if (pool == pools_.end() || !pool->second.provider) return nullptr;
  return working_context(pool->second.provider->ordinal());
}

bool CudaPools::is_begun(const Key& key) const {
  return std::any_of(begun_pools_.begin(), begun_pools_.end(),
                     [&](const Begun& begun) { return begun.key == key; });
}

bool CudaPools::is_captured() const {
  return std::any_of(begun_pools_.begin(), begun_pools_.end(),
                     [](const Begun& begun) { return begun.is_capture; });
}

bool CudaPools::has_captured(const Context& context) const {
  const Lock lock(mutex_);
  return std::any_of(pools_.begin(), pools_.end(), [&](const auto& entry) {
    const Contexts& contexts = entry.second.captured_in;
    return std::any_of(contexts.begin(), contexts.end(),
                       [&](const auto& known) { return known.get() == &context; });
  });
}

// 0 also for a pool that does not exist, which native only tells by an error.
int CudaPools::use_count(const Key& key) const {
  try {
    return native_->getPoolUseCount(key.first, key.second);
  } catch (const c10::Error&) {
    return 0;
  }
}

// Made -------------------------------------------------------------------------------------------

// Makes a pool that does not exist yet, with one reference. False if it does, or nobody provides.
bool CudaPools::provide(const Key& key, const std::shared_ptr<CudaDevice>& served) {
  if (!served || pools_.contains(key) || use_count(key) != 0) return false;
  const auto provider = std::make_shared<SegmentProvider>(served);
  ScopeExit undo([&] { pools_.erase(key); });
  pools_[key].provider = provider;
  native_->createOrIncrefPool(key.first, key.second, provider);
  undo.dismiss();
  return true;
}

void CudaPools::create(c10::DeviceIndex device, Id id, std::shared_ptr<Native> allocator,
                       const std::shared_ptr<CudaDevice>& served) {
  const Lock lock(mutex_);
  const Key key{device, id};
  if (allocator || !provide(key, served)) {
    native_->createOrIncrefPool(device, id, std::move(allocator));
  }
  ++pools_[key].references;
}

// Begun ------------------------------------------------------------------------------------------

CudaPools::Capture::Capture(std::shared_ptr<CudaDevice> on, StreamId stream)
    : device(std::move(on)) {
  const Blocking blocking;
  number = device->begin_capture(stream);
}

void CudaPools::begin(c10::DeviceIndex device, Id id, Filter filter,
                      const std::shared_ptr<Context>& context,
                      const std::shared_ptr<CudaDevice>& served) {
  const Key key{device, id};
  const StreamId stream = current_cuda_stream(device);
  // A MemPool takes whatever its thread or stream asks for; a capture takes nothing yet, since it
  // only begins after this.
  Begun begun;
  begun.key = key;
  begun.filter = filter;
  begun.is_capture = !filter(handle_of(stream));
  if (begun.is_capture && served) begun.capture = std::make_shared<Capture>(served, stream);
  if (!begun.is_capture && filter(handle_of(kNoStream))) {
    begun.marks.push_back(mark_of_thread());
  } else {
    const auto owner = context_of_work(stream);
    for (const auto& marked : {context, owner == context ? nullptr : owner}) {
      if (marked) begun.marks.push_back(mark_of(marked));
    }
  }

  const bool is_first = begun.is_capture && served && !served->is_capturing(stream);
  const auto turn = wait_for_last_resort();
  const Lock lock(mutex_);
  // Native says so only when it has counted another reference.
  TORCH_CHECK(!is_begun(key), "beginAllocateToPool: already recording to mempool_id");
  begun_pools_.reserve(begun_pools_.size() + 1);
  const bool is_new = provide(key, served);
  try {
    Pool& pool = pools_[key];
    const bool is_known = std::find(pool.captured_in.begin(), pool.captured_in.end(), context) !=
                          pool.captured_in.end();
    pool.captured_in.reserve(pool.captured_in.size() + 1);
    native_->beginAllocateToPool(device, id, std::move(filter));
    ++pool.references;
    if (begun.is_capture && context && !is_known) pool.captured_in.push_back(context);
  } catch (...) {
    if (is_new) {
      native_->releasePool(device, id);
      pools_.erase(key);
    }
    throw;
  }
  // What has begun has a reference of its own.
  if (is_new) native_->releasePool(device, id);
  begun.number = next_number_++;
  if (begun.is_capture && served) {
    announced = {.device = device,
                 .id = id,
                 .number = begun.number,
                 .stream = stream,
                 .is_first = is_first,
                 .on = served};
  }
  begun_pools_.push_back(std::move(begun));
  ++begun_;
}

// What they leave ends without the lock: a capture waits for moves that go on beside it.
std::vector<CudaPools::Begun> CudaPools::forget(const Key& key) {
  std::vector<Begun> ended;
  std::erase_if(begun_pools_, [&](Begun& begun) {
    const bool is_it = begun.key == key;
    if (is_it) ended.push_back(std::move(begun));
    return is_it;
  });
  begun_ -= static_cast<int>(ended.size());
  return ended;
}

void CudaPools::end(c10::DeviceIndex device, Id id) {
  {
    std::vector<Begun> ended;
    const Lock lock(mutex_);
    ended = forget({device, id});
    native_->endAllocateToPool(device, id);
  }
  empty_released();
}

bool CudaPools::is_begun(const Announced& capture) const {
  const Lock lock(mutex_);
  return std::any_of(begun_pools_.begin(), begun_pools_.end(),
                     [&](const Begun& begun) { return begun.number == capture.number; });
}

std::optional<CudaPools::Announced> CudaPools::take_announced() {
  return std::exchange(announced, std::nullopt);
}

// Released ---------------------------------------------------------------------------------------

Contexts CudaPools::release(c10::DeviceIndex device, Id id) {
  Contexts captured_in;
  {
    const Lock lock(mutex_);
    const Key key{device, id};
    native_->releasePool(device, id);
    const auto entry = pools_.find(key);
    if (entry == pools_.end()) return {};
    Pool& pool = entry->second;
    if (--pool.references > 0) return {};
    captured_in = std::move(pool.captured_in);
    if (pool.use_on_oom) --last_resorts_;
    if (pool.provider) released_.push_back({key, pool.provider});
    released_count_ = released_.size();
    pools_.erase(entry);
  }
  return captured_in;
}

Contexts CudaPools::abandon(const Announced& capture) {
  const Blocking blocking;
  const Key key{capture.device, capture.id};
  at::HostAllocator* pinned = at::getHostAllocator(at::kCUDA);
  if (capture.is_first) try_to([&] { capture.on->abandon_capture(capture.stream); });
  {
    std::vector<Begun> ended;
    const Lock lock(mutex_);
    if (is_begun(capture)) {
      ended = forget(key);
      try_to([&] { native_->endAllocateToPool(capture.device, capture.id); });
      try_to([&] { pinned->end_allocate_to_pool(capture.id); });
    }
  }
  try_to([&] { pinned->release_pool(capture.id); });
  Contexts captured_in;
  try_to([&] { captured_in = release(capture.device, capture.id); });
  return captured_in;
}

bool CudaPools::empty_released() {
  if (released_count_.load() == 0) return false;
  const Blocking blocking;
  // Whoever comes second sees what the first has got.
  const Lock turn(emptying_);
  // Native waits for work here, and may take the GIL for its history: so not under our lock.
  std::vector<Released> due;
  {
    const Lock lock(mutex_);
    if (released_.empty() || is_captured()) return false;
    due.swap(released_);
  }
  bool came_back = false;
  std::erase_if(due, [&](const Released& pool) {
    const std::size_t before = pool.provider->count();
    // Native refuses while something is captured, which is not to begin meanwhile.
    try_to([&] {
      pool.provider->device().without_captures([&] { native_->emptyCache(pool.key.second); });
    });
    came_back |= pool.provider->count() < before;
    // Live tensors keep segments; they are asked for again later.
    return pool.provider->count() == 0;
  });
  const Lock lock(mutex_);
  released_.insert(released_.end(), due.begin(), due.end());
  released_count_ = released_.size();
  return came_back;
}

}  // namespace pgk
