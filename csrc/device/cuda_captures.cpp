#include "device/cuda_captures.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "device/device.h"

namespace pgk {
namespace {

using namespace std::chrono_literals;

// A hold takes some milliseconds. So long only if the driver does not come back.
constexpr auto kLongestHold = 10s;
// How long a capture lets a hold go first that itself waits for captures.
constexpr auto kPoliteness = 50ms;
// From the announcement to the driver's beginning.
constexpr auto kBeginning = 100ms;
constexpr auto kLookAgain = 500us;

}  // namespace

void CudaCaptures::begin(CUstream stream) {
  std::unique_lock lock(mutex_);
  const auto polite_until = Clock::now() + kPoliteness;
  changed_.wait_until(lock, polite_until, [this] { return keepers_ == 0 && waiting_ == 0; });
  if (!changed_.wait_for(lock, kLongestHold, [this] { return keepers_ == 0; })) {
    throw Error(ErrorCode::busy, "cuda: a capture cannot begin while memory is being moved");
  }
  captures_.push_back({stream, std::this_thread::get_id(), Clock::now()});
}

void CudaCaptures::end(CUstream stream) {
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(captures_, [=](const Capture& capture) { return capture.stream == stream; });
  }
  changed_.notify_all();
}

bool CudaCaptures::is_over(Capture& capture) const {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver_.cuStreamIsCapturing_fn(capture.stream, &status);
  const bool goes_on = result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE;
  capture.has_begun |= goes_on;
  return !goes_on && (capture.has_begun || Clock::now() - capture.announced_at > kBeginning);
}

CudaCaptures::KeptOut CudaCaptures::keep_out(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const auto is_others = [](const Capture& capture) {
    return capture.thread != std::this_thread::get_id();
  };
  for (;;) {
    std::erase_if(captures_, [this](Capture& capture) { return is_over(capture); });
    const auto other = std::find_if(captures_.begin(), captures_.end(), is_others);
    if (other == captures_.end()) break;
    if (Clock::now() >= deadline) {
      throw Restless(reinterpret_cast<StreamId>(other->stream),
                     "cuda: a graph is being captured on stream " +
                         std::to_string(reinterpret_cast<std::uintptr_t>(other->stream)));
    }
    ++waiting_;
    changed_.wait_for(lock, kLookAgain);
    --waiting_;
  }
  ++keepers_;
  return {*this, !captures_.empty()};
}

void CudaCaptures::let_in() {
  {
    const std::lock_guard lock(mutex_);
    --keepers_;
  }
  changed_.notify_all();
}

}  // namespace pgk
