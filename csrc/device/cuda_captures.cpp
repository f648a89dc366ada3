#include "device/cuda_captures.h"

#include <algorithm>
#include <string>

#include "device/device.h"

namespace pgk {
namespace {

using namespace std::chrono_literals;

// A hold takes some milliseconds. So long only if the driver does not come back.
constexpr auto kLongestHold = 10s;
// How long a capture lets a hold go first that itself waits for captures.
constexpr auto kPoliteness = 50ms;
// From the announcement to the driver's beginning, with torch's locks in between.
constexpr auto kBeginning = 2s;
constexpr auto kLookAgain = 500us;

}  // namespace

std::uint64_t CudaCaptures::begin(CUstream stream, const std::vector<CUstream>& known) {
  Lock lock(mutex_);
  const auto polite_until = Clock::now() + kPoliteness;
  changed_.wait_until(lock, polite_until, [this] { return keepers_ == 0 && waiting_ == 0; });
  if (!changed_.wait_for(lock, kLongestHold, [this] { return keepers_ == 0; })) {
    throw Error(ErrorCode::busy, "cuda: a capture cannot begin while memory is being moved");
  }
  captures_.push_back(
      {++last_number_, stream, std::this_thread::get_id(), Clock::now(), mark(known)});
  return last_number_;
}

void CudaCaptures::end(std::uint64_t number) {
  {
    Lock lock(mutex_);
    changed_.wait_for(lock, kLongestHold, [this] { return keepers_ == 0; });
    for (Capture& capture : captures_) {
      if (capture.number != number) continue;
      capture.has_begun = goes_on(capture);
      if (!capture.has_begun) capture.stream = nullptr;
    }
    forget_ended();
  }
  changed_.notify_all();
}

std::vector<CUevent> CudaCaptures::mark(const std::vector<CUstream>& streams) const {
  std::vector<CUevent> events;
  try {
    for (CUstream stream : streams) {
      // To ask a captured one would break that capture.
      CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
      const CUresult asked = driver_.cuStreamIsCapturing_fn(stream, &status);
      if (asked != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_NONE) continue;
      if (driver_.cuStreamQuery_fn(stream) != CUDA_ERROR_NOT_READY) continue;
      CUevent event = nullptr;
      driver_.check(driver_.cuEventCreate_fn(&event, CU_EVENT_DISABLE_TIMING), "capture (event)");
      events.push_back(event);
      driver_.check(driver_.cuEventRecord_fn(event, stream), "capture (record)");
    }
  } catch (...) {
    forget(events);
    throw;
  }
  return events;
}

void CudaCaptures::forget(std::vector<CUevent>& events) const {
  for (CUevent event : events) driver_.cuEventDestroy_fn(event);
  events.clear();
}

bool CudaCaptures::is_past(const std::vector<CUevent>& events) const {
  return std::none_of(events.begin(), events.end(), [this](CUevent event) {
    return driver_.cuEventQuery_fn(event) == CUDA_ERROR_NOT_READY;
  });
}

bool CudaCaptures::goes_on(const Capture& capture) const {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver_.cuStreamIsCapturing_fn(capture.stream, &status);
  return result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE;
}

bool CudaCaptures::is_over(Capture& capture) const {
  if (capture.stream == nullptr) return true;
  const bool goes_on = this->goes_on(capture);
  capture.has_begun |= goes_on;
  return !goes_on && (capture.has_begun || Clock::now() - capture.announced_at > kBeginning);
}

void CudaCaptures::forget_ended() {
  std::erase_if(captures_, [this](Capture& capture) {
    if (!is_over(capture)) return false;
    forget(capture.before);
    return true;
  });
}

bool CudaCaptures::is_beside_locked() const {
  const auto is_own = [](const Capture& capture) {
    return capture.thread == std::this_thread::get_id();
  };
  return is_beside_ || std::any_of(captures_.begin(), captures_.end(), is_own);
}

bool CudaCaptures::is_beside() const {
  const std::lock_guard lock(mutex_);
  return is_beside_locked();
}

void CudaCaptures::await(Lock& lock, Clock::time_point deadline) {
  for (;;) {
    forget_ended();
    const bool is_beside = is_beside_locked();
    const auto is_in_the_way = [&](const Capture& capture) {
      return !is_beside || !is_past(capture.before);
    };
    const auto other = std::find_if(captures_.begin(), captures_.end(), is_in_the_way);
    if (other == captures_.end()) return;
    if (Clock::now() >= deadline) {
      const auto id = reinterpret_cast<StreamId>(other->stream);
      throw Restless(id, "cuda: stream " + std::to_string(id) + " is being captured into a graph");
    }
    ++waiting_;
    changed_.wait_for(lock, kLookAgain);
    --waiting_;
  }
}

CudaCaptures::KeptOut CudaCaptures::keep_out(Clock::time_point deadline) {
  Lock lock(mutex_);
  await(lock, deadline);
  ++keepers_;
  return {*this, !captures_.empty()};
}

void CudaCaptures::await(Clock::time_point deadline) {
  Lock lock(mutex_);
  await(lock, deadline);
}

void CudaCaptures::let_in() {
  {
    const std::lock_guard lock(mutex_);
    --keepers_;
  }
  changed_.notify_all();
}

}  // namespace pgk
