// The device's second part: captures, streams and events.
#include <algorithm>
#include <string>
#include <utility>

#include "core/error.h"
#include "device/cuda_device.h"
#include "device/waiters.h"

namespace pgk {

std::uint64_t CudaDevice::begin_capture(StreamId stream) {
  const Scope scope(*this);
  announce(stream);
  std::vector<CUstream> known;
  for (const StreamId id : known_.all()) known.push_back(handle_of(id));
  return captures_.begin(handle_of(stream), known);
}

void CudaDevice::abandon_capture(StreamId stream) {
  const Scope scope(*this);
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  driver_.cuStreamIsCapturing_fn(handle_of(stream), &status);
  if (status == CU_STREAM_CAPTURE_STATUS_NONE) return;
  CUgraph graph = nullptr;
  // Fails for one that has been broken, and ends it all the same.
  driver_.cuStreamEndCapture_fn(handle_of(stream), &graph);
  if (graph != nullptr) driver_.cuGraphDestroy_fn(graph);
}

void CudaDevice::without_captures(const std::function<void()>& call) {
  const Scope scope(*this);
  const CudaCaptures::KeptOut captures = captures_.keep_out(CudaCaptures::Clock::now());
  if (captures.is_beside_capture()) throw Restless(kNoStream, "cuda: a graph is being captured");
  call();
}

std::optional<EventId> CudaDevice::record_all() {
  const Scope scope(*this);
  try {
    const CudaCaptures::KeptOut captures = captures_.keep_out(CudaCaptures::Clock::now());
    if (captures.is_beside_capture()) return std::nullopt;
    if (driver_.cuCtxRecordEvent_fn != nullptr) return events_.record_all(context_);
    driver_.check(driver_.cuCtxSynchronize_fn(), "synchronize");
    return EventId{0};
  } catch (const Restless&) {
    return std::nullopt;
  }
}

void CudaDevice::await_captures(std::chrono::nanoseconds patience) {
  const Scope scope(*this);
  captures_.await(CudaCaptures::Clock::now() + patience);
}

// Streams that were given back still exist.
CUstream CudaDevice::handle_of(StreamId stream) {
  return reinterpret_cast<CUstream>(stream);
}

CUstream CudaDevice::find(StreamId stream) const {
  // No handle points into the first page.
  bool known = stream >= 4096 || stream == kDefaultStream;
  {
    const std::lock_guard lock(streams_mutex_);
    const auto it = streams_.find(stream);
    if (it != streams_.end()) known = it->second.in_use;
  }
  if (!known) {
    throw Error(ErrorCode::invalid_value,
                properties_.name + ": no stream " + std::to_string(stream));
  }
  return handle_of(stream);
}

StreamId CudaDevice::do_create_stream(int priority, ProcessorSet processors) {
  {
    const std::lock_guard lock(streams_mutex_);
    for (auto& [id, stream] : streams_) {
      if (stream.in_use || stream.priority != priority || stream.processors != processors) continue;
      stream.in_use = true;
      return id;
    }
  }
  const Scope scope(*this);
  const std::lock_guard creating(mutex_);
  CUstream handle = nullptr;
  if (processors == 0) {
    driver_.check(driver_.cuStreamCreateWithPriority_fn(&handle, CU_STREAM_NON_BLOCKING, priority),
                  "create_stream");
  } else {
    handle = processors_.create_stream(processors, priority);
  }
  const std::lock_guard lock(streams_mutex_);
  streams_.emplace(id_of(handle), Stream{priority, processors, true});
  return id_of(handle);
}

void CudaDevice::do_destroy_stream(StreamId stream) {
  const CUstream handle = find(stream);
  const Scope scope(*this);
  const CUresult result = driver_.cuStreamQuery_fn(handle);
  if (result == CUDA_ERROR_NOT_READY) {
    throw Error(ErrorCode::busy,
                properties_.name + ": stream " + std::to_string(stream) + " has unfinished work");
  }
  driver_.check(result, "destroy_stream");
  const std::lock_guard lock(streams_mutex_);
  const auto it = streams_.find(stream);
  if (it == streams_.end()) {
    throw Error(ErrorCode::invalid_value,
                properties_.name + ": stream " + std::to_string(stream) + " was not created here");
  }
  it->second.in_use = false;
}

bool CudaDevice::is_idle(StreamId stream) {
  const Scope scope(*this);
  const CUresult result = driver_.cuStreamQuery_fn(handle_of(stream));
  if (result == CUDA_ERROR_NOT_READY) return false;
  driver_.check(result, "query");
  return true;
}

bool CudaDevice::is_capturing(StreamId stream) {
  const Scope scope(*this);
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver_.cuStreamIsCapturing_fn(handle_of(stream), &status);
  // The default stream, while a stream that synchronises with it is captured.
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return true;
  driver_.check(result, "query");
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

void CudaDevice::copy_between(Address destination, int destination_ordinal, Address source,
                              int source_ordinal, std::size_t bytes, StreamId stream) {
  const CUstream handle = find(stream);
  const int other = destination_ordinal == ordinal_ ? source_ordinal : destination_ordinal;
  CUcontext context = nullptr;
  driver_.check(driver_.cuDevicePrimaryCtxRetain_fn(&context, other), "cuDevicePrimaryCtxRetain");
  const auto context_of = [&](int ordinal) { return ordinal == ordinal_ ? context_ : context; };
  // The null stream of the source's device has no name in another context.
  CUresult result = driver_.cuCtxPushCurrent_fn(context_of(source_ordinal));
  if (result == CUDA_SUCCESS) {
    result = driver_.cuMemcpyPeerAsync_fn(destination, context_of(destination_ordinal), source,
                                          context_of(source_ordinal), bytes, handle);
    CUcontext popped = nullptr;
    driver_.cuCtxPopCurrent_fn(&popped);
  }
  driver_.cuDevicePrimaryCtxRelease_fn(other);
  driver_.check(result, "copy", bytes);
}

void CudaDevice::do_copy(Address destination, Address source, std::size_t bytes, StreamId stream) {
  const CUstream handle = find(stream);
  const Scope scope(*this);
  driver_.check(driver_.cuMemcpyAsync_fn(destination, source, bytes, handle), "copy", bytes);
}

EventId CudaDevice::do_record(StreamId stream) {
  const CUstream handle = find(stream);
  const Scope scope(*this);
  return events_.record(handle);
}

void CudaDevice::do_wait(StreamId stream, EventId event) {
  const CUstream handle = find(stream);
  const Scope scope(*this);
  events_.wait(handle, event);
}

bool CudaDevice::is_done(EventId event) {
  const Scope scope(*this);
  return events_.is_done(event);
}

void CudaDevice::do_synchronize() {
  const Scope scope(*this);
  driver_.check(driver_.cuCtxSynchronize_fn(), "synchronize");
}

void CudaDevice::do_synchronize_stream(StreamId stream) {
  const CUstream handle = find(stream);
  const Scope scope(*this);
  driver_.check(driver_.cuStreamSynchronize_fn(handle), "synchronize");
}

void CudaDevice::do_synchronize_event(EventId event) {
  const Scope scope(*this);
  events_.synchronize(event);
}

// Nothing is put on the device for it: a wait in a stream of its own could hold up streams that
// share a hardware queue with it.
void CudaDevice::do_notify(EventId event, Alarm alarm) {
  Waiters::wait_for([self = shared_from_this(), event, alarm = std::move(alarm)] {
    try {
      self->do_synchronize_event(event);
    } catch (const Error&) {
      // Whoever is woken asks is_done(), which says so.
    }
    alarm();
  });
}

}  // namespace pgk
