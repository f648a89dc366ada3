#include "device/cuda_staging.h"

#include <algorithm>

#include "core/error.h"

namespace pgk {

CudaStaging::~CudaStaging() {
  release_buffers();
  for (CUevent event : filled_) {
    if (event != nullptr) driver_.cuEventDestroy_fn(event);
  }
  for (CUevent event : copied_) {
    if (event != nullptr) driver_.cuEventDestroy_fn(event);
  }
  for (CUstream stream : {filling_, emptying_}) {
    if (stream != nullptr) driver_.cuStreamDestroy_fn(stream);
  }
}

bool CudaStaging::make_room(std::size_t bytes) {
  release_buffers();
  if (!prepare()) return false;
  CUmemAllocationProp memory{};
  memory.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  memory.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  memory.location.id = ordinal_;
  buffers_.reserve(kBuffers);
  while (buffers_.size() < kBuffers) {
    // Unlike cuMemAlloc's, this memory is given back without waiting for all the device's work.
    CUmemGenericAllocationHandle handle{};
    if (driver_.cuMemCreate_fn(&handle, bytes, &memory, 0) != CUDA_SUCCESS) break;
    const Handle buffer{handle, bytes, false};
    try {
      mappings_.alias_of(buffer);
    } catch (const Error&) {
      driver_.cuMemRelease_fn(handle);
      break;
    }
    buffers_.push_back(buffer);
  }
  // One alone serves as well, only that it is not filled while it is emptied.
  if (!buffers_.empty()) buffer_bytes_ = bytes;
  return !buffers_.empty();
}

// What was created stays for the next try.
bool CudaStaging::prepare() {
  const auto create_event = [this](CUevent& event) {
    constexpr unsigned flags = CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC;
    return event != nullptr || driver_.cuEventCreate_fn(&event, flags) == CUDA_SUCCESS;
  };
  const auto create_stream = [this](CUstream& stream) {
    return stream != nullptr || driver_.cuStreamCreateWithPriority_fn(
                                    &stream, CU_STREAM_NON_BLOCKING, 0) == CUDA_SUCCESS;
  };
  return create_stream(filling_) && create_stream(emptying_) &&
         std::all_of(filled_.begin(), filled_.end(), create_event) &&
         std::all_of(copied_.begin(), copied_.end(), create_event);
}

void CudaStaging::release_buffers() noexcept {
  for (const Handle& buffer : buffers_) {
    try {
      mappings_.drop_alias(buffer);
    } catch (const Error&) {
      // A device that has failed; what can still be given back is.
    }
    driver_.cuMemRelease_fn(buffer.id);
  }
  buffers_.clear();
  buffer_bytes_ = 0;
}

bool CudaStaging::is_full(std::size_t bytes, std::size_t limit) const {
  return copies_.size() == kSlots || (!is_empty() && bytes_ + bytes > limit);
}

void CudaStaging::add(Move& move, const CudaFingerprint& fingerprint) {
  const std::size_t slot = next_ % kSlots;
  const std::size_t index = next_ % buffers_.size();
  const Address buffer = mappings_.alias_of(buffers_[index]);
  const Address target = mappings_.alias_of(move.to);
  // The page that was in this buffer last. Its event is not yet another one's: there are no more
  // buffers than slots.
  const CUevent emptied = copied_[(next_ + kSlots - buffers_.size()) % kSlots];
  const std::size_t bytes = move.from.bytes;
  move.known.reset();
  // First, so that clear() waits also if submitting fails in between.
  copies_.push_back(&move);
  bytes_ += bytes;
  ++next_;

  driver_.check(driver_.cuStreamWaitEvent_fn(filling_, emptied, CU_EVENT_WAIT_DEFAULT),
                "move (wait)");
  driver_.check(driver_.cuMemcpyAsync_fn(buffer, move.address, bytes, filling_), "move (stage)",
                bytes);
  fingerprint.launch(filling_, buffer, bytes, CudaFlags::address_of(flags_.staged[slot]));
  driver_.check(driver_.cuEventRecord_fn(filled_[index], filling_), "move (record)");

  driver_.check(driver_.cuStreamWaitEvent_fn(emptying_, filled_[index], CU_EVENT_WAIT_DEFAULT),
                "move (wait)");
  driver_.check(driver_.cuMemcpyAsync_fn(target, buffer, bytes, emptying_), "move (copy)", bytes);
  driver_.check(driver_.cuEventRecord_fn(copied_[slot], emptying_), "move (record)");
}

Move* CudaStaging::oldest_copied() const {
  if (is_empty()) return nullptr;
  const CUresult result = driver_.cuEventQuery_fn(copied_[oldest_slot()]);
  if (result == CUDA_ERROR_NOT_READY) return nullptr;
  driver_.check(result, "move (query)");
  return copies_.front();
}

void CudaStaging::await_oldest() const {
  driver_.check(driver_.cuEventSynchronize_fn(copied_[oldest_slot()]), "move (synchronize)");
}

Fingerprint CudaStaging::fingerprint_of_oldest() const {
  return flags_.staged[oldest_slot()];
}

void CudaStaging::remove_oldest() {
  bytes_ -= copies_.front()->from.bytes;
  copies_.pop_front();
}

void CudaStaging::clear() noexcept {
  if (is_empty()) return;
  // Should it fail, the device has, and nothing runs.
  driver_.cuStreamSynchronize_fn(filling_);
  driver_.cuStreamSynchronize_fn(emptying_);
  copies_.clear();
  bytes_ = 0;
}

}  // namespace pgk
