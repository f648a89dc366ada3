#include "device/cuda_events.h"

#include <algorithm>

namespace pgk {

EventId CudaEvents::record(CUstream stream) {
  return record_by([&](CUevent event) { return driver_.cuEventRecord_fn(event, stream); });
}

EventId CudaEvents::record_all(CUcontext context) {
  return record_by([&](CUevent event) { return driver_.cuCtxRecordEvent_fn(context, event); });
}

template <typename Record>
EventId CudaEvents::record_by(const Record& record) {
  const std::lock_guard lock(mutex_);
  // Events that were only waited for on the device are never asked about.
  if (pending_.size() >= sweep_at_) sweep();
  if (idle_.empty()) {
    CUevent event = nullptr;
    driver_.check(
        driver_.cuEventCreate_fn(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC),
        "record");
    idle_.push_back(event);
  }
  driver_.check(record(idle_.back()), "record");
  pending_.emplace(next_, idle_.back());
  idle_.pop_back();
  return next_++;
}

// Null for an event that is known to be done.
CUevent CudaEvents::pending(EventId event) const {
  const auto it = pending_.find(event);
  return it == pending_.end() ? nullptr : it->second;
}

void CudaEvents::sweep() {
  std::erase_if(pending_, [this](const auto& entry) {
    if (driver_.cuEventQuery_fn(entry.second) != CUDA_SUCCESS) return false;
    idle_.push_back(entry.second);
    return true;
  });
  sweep_at_ = std::max<std::size_t>(kFew, 2 * pending_.size());
}

void CudaEvents::retire(EventId event) {
  const auto it = pending_.find(event);
  if (it == pending_.end()) return;
  idle_.push_back(it->second);
  pending_.erase(it);
}

// Reused events make the lock necessary over the driver's call: the event must not start to mean
// something else while it is asked about.
void CudaEvents::wait(CUstream stream, EventId event) {
  const std::lock_guard lock(mutex_);
  if (CUevent native = pending(event)) {
    driver_.check(driver_.cuStreamWaitEvent_fn(stream, native, CU_EVENT_WAIT_DEFAULT), "wait");
  }
}

bool CudaEvents::is_done(EventId event) {
  const std::lock_guard lock(mutex_);
  CUevent native = pending(event);
  if (native == nullptr) return true;
  const CUresult result = driver_.cuEventQuery_fn(native);
  if (result == CUDA_ERROR_NOT_READY) return false;
  driver_.check(result, "query");
  retire(event);
  return true;
}

void CudaEvents::synchronize(EventId event) {
  CUevent native = nullptr;
  {
    const std::lock_guard lock(mutex_);
    native = pending(event);
  }
  // Should another thread retire and reuse the event meanwhile, this waits longer, never less.
  if (native != nullptr) driver_.check(driver_.cuEventSynchronize_fn(native), "synchronize");
  const std::lock_guard lock(mutex_);
  if (native != nullptr && pending(event) == native) retire(event);
}

}  // namespace pgk
