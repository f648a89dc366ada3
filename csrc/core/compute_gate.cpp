#include "core/compute_gate.h"

#include <algorithm>
#include <thread>

#include "core/blocking.h"
#include "core/context.h"

namespace pgk {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr microseconds kAhead{500};
constexpr std::size_t kMostMarks = 64;
constexpr std::size_t kFewMarks = 8;
constexpr microseconds kMarkEvery{100};  // where operations are short
constexpr microseconds kPollEvery{50};
constexpr microseconds kNextRequest{200};
// Longer than the gaps of a model that is run eagerly, and than a turn of Python's GIL, 5 ms.
constexpr milliseconds kIdleFor{10};
constexpr milliseconds kLongestHold{500};

}  // namespace

// As a sender does whose network is congested.
void ComputeGate::RunAhead::adapt(Clock::duration took) {
  if (took > kAhead) window_ /= 2;
  if (took < kAhead / 2) window_ = std::min(window_ + 1, kMostMarks);
}

void ComputeGate::RunAhead::limit(Device& device, StreamId stream) {
  if (stream != stream_) {
    marks_.clear();
    stream_ = stream;
  }
  if (device.is_idle(stream)) {
    if (!marks_.empty() && Clock::now() - marks_.front().submitted < kAhead) adapt({});
    marks_.clear();
  } else {
    marks_.push_back({device.record(stream), last_});
  }
  while (marks_.size() > window_) {
    const Mark mark = marks_.front();
    marks_.pop_front();
    if (device.is_done(mark.event)) {
      // Nobody knows since when.
      if (Clock::now() - mark.submitted < kAhead) adapt({});
      continue;
    }
    const Blocking blocking;
    device.synchronize_event(mark.event);
    adapt(Clock::now() - mark.submitted);
  }
  last_ = Clock::now();
}

void ComputeGate::enrol(const std::shared_ptr<Context>& context) {
  const std::lock_guard lock(mutex_);
  std::erase_if(guaranteed_, [](const auto& known) { return known.expired(); });
  guaranteed_.push_back(context);
}

bool ComputeGate::is_open() const {
  if (sessions_.load(std::memory_order_acquire) != 0) return false;
  const Clock::duration ended(ended_.load(std::memory_order_relaxed));
  return Clock::now().time_since_epoch() - ended > kNextRequest;
}

bool ComputeGate::is_working() {
  if (device_->properties().is_host) return true;
  const std::lock_guard lock(mutex_);
  return std::any_of(guaranteed_.begin(), guaranteed_.end(), [this](const auto& known) {
    const auto context = known.lock();
    if (!context || context->sessions() == 0) return false;
    const StreamId stream = context->stream();
    return stream != kNoStream && (device_->is_capturing(stream) || !device_->is_idle(stream));
  });
}

void ComputeGate::hold(RunAhead& ahead) {
  const Blocking blocking;
  const Clock::time_point start = Clock::now();
  Clock::time_point worked = start;
  while (!is_open()) {
    const Clock::time_point now = Clock::now();
    if (sessions_.load(std::memory_order_relaxed) == 0 || is_working()) worked = now;
    ahead.passes_ = now - worked > kIdleFor;
    if (ahead.passes_ || now - start > kLongestHold) return;
    std::this_thread::sleep_for(kPollEvery);
  }
}

void ComputeGate::pass(StreamId stream, RunAhead& ahead) {
  const bool is_open = this->is_open();
  const bool is_marked = ahead.stream_ == stream && ahead.window_ > kFewMarks &&
                         Clock::now() - ahead.last_ < kMarkEvery;
  if (is_open && is_marked) return;
  // Nothing may be asked of a stream that is captured, nor waited for.
  if (device_->is_capturing(stream)) return;
  if (is_open) {
    ahead.passes_ = false;
  } else if (!ahead.passes_ || is_working()) {
    hold(ahead);
  }
  ahead.limit(*device_, stream);
}

}  // namespace pgk
