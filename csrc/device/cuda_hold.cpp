#include "device/cuda_hold.h"

#include <algorithm>
#include <string>
#include <thread>

#include "core/error.h"
#include "device/waiters.h"

namespace pgk {
namespace {

using namespace std::chrono_literals;

// From the first stop to the last flag: with what comes then no more than a guaranteed request
// should feel.
constexpr auto kLongestStop = 1500us;
// The same of streams that matter less, once they have done what they had to: it may be that much
// again, a kernel takes long that reads host memory.
constexpr std::chrono::nanoseconds kPatientStop = 60ms;
constexpr int kPartOfPatience = 2;
constexpr auto kYielding = 200us;
// A page takes some milliseconds at most. Longer only if a hardware queue is blocked, which will
// not change.
constexpr auto kNothingComes = 200ms;
// But if the device has failed, no flag will ever tell.
constexpr auto kUntilAsked = 50ms;

constexpr const char* kRestless = "did not come to rest";
constexpr const char* kSlow = "the device was slow";

// A stream that has been destroyed has nothing to do.
bool is_gone(CUresult result) {
  return result == CUDA_ERROR_INVALID_HANDLE || result == CUDA_ERROR_CONTEXT_IS_DESTROYED;
}

StreamId id_of(CUstream stream) {
  return reinterpret_cast<StreamId>(stream);
}

}  // namespace

CudaHold::~CudaHold() {
  holds_.flags().open(number_);
  if (start_ != Clock::time_point{}) holds_.pace().add(start_, Clock::now());
  if (watchdog_ != nullptr) watchdog_->stop();
  if (submitted_ == Submitted::part) {
    // A call failed in between, so no flag will tell. Should these fail, the device has.
    holds_.driver_.cuStreamSynchronize_fn(stream_);
    holds_.driver_.cuStreamSynchronize_fn(branch_);
  }
  if (submitted_ != Submitted::all) return;
  try {
    for (renew(); !CudaFlags::holds(holds_.flags().finished, number_);) {
      if (Clock::now() - since_ < kYielding) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(20us);
        if (has_failed()) return;
        ask_device();
      }
    }
  } catch (const Error&) {
    // A device that has failed runs nothing.
  }
}

void CudaHold::note_active(const Streams& streams, std::vector<CUstream>& active) const {
  for (const Stream& stream : streams()) {
    const bool is_new = std::find(active.begin(), active.end(), stream.handle) == active.end();
    if (is_new && !is_capturing(stream.handle) && !is_idle(stream.handle)) {
      active.push_back(stream.handle);
    }
  }
}

void CudaHold::take(const Work& work, const Terms& terms) {
  try {
    if (terms.way == Way::streams) {
      stop_each(work, terms);
    } else {
      hold_all(work, terms);
    }
    CudaFlags::raise(holds_.flags().go, number_);
    while (!CudaFlags::holds(holds_.flags().started, number_)) {
      if (watchdog_->has_opened()) give_up(nullptr, kSlow);
      std::this_thread::yield();
    }
    if (!watchdog_->stop()) give_up(nullptr, kSlow);
  } catch (const Restless&) {
    // It may be that somebody shares a hardware queue with ours.
    holds_.change_streams();
    throw;
  }
  renew();
}

void CudaHold::hold_all(const Work& work, const Terms& terms) {
  const std::vector<CUstream> patient = active(terms, /*patient_ones=*/true);
  std::vector<CUstream> others = active(terms, /*patient_ones=*/false);
  await_backlog(patient, terms.patience);

  const std::size_t most = holds_.most_stops();
  // Whoever stands still for long must not take all hardware queues.
  const auto beyond = patient.begin() + std::min(patient.size(), most / 2);
  watchdog_ = std::make_shared<CudaWatchdog>(holds_.flags(), number_);
  std::vector<Stop> stopped;
  if (beyond != patient.begin()) {
    watch_for(std::max(kPatientStop, terms.patience / kPartOfPatience), patient.front());
    stopped = stop({patient.begin(), beyond});
    await_stops(stopped);
  }
  // Only now: those that stand still may have taken the hardware queues of ours.
  probe();
  others.insert(others.end(), beyond, patient.end());
  // Where there is but one hardware queue, everybody would wait behind our work.
  const bool is_early = most > 0;
  if (!is_early) await_lull(others, terms.lull);
  watch_for(terms.lull + kLongestStop, nullptr);
  submit(work);
  if (is_early) await_lull(others, terms.lull);
  start_ = Clock::now();
  watch_for(kLongestStop, nullptr);
  others.resize(std::min(others.size(), most - stopped.size()));
  const std::vector<Stop> more = stop(others);
  stopped.insert(stopped.end(), more.begin(), more.end());
  const CUresult result = holds_.driver_.cuCtxWaitEvent_fn(holds_.context_, holds_.event_);
  if (result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) {
    give_up(nullptr, "a graph is being captured that nobody announced");
  }
  holds_.driver_.check(result, "move (hold)");
  await_rest(terms.streams, stopped);
}

// Streams are held one by one: all of them, since nothing else keeps idle ones from going on.
void CudaHold::stop_each(const Work& work, const Terms& terms) {
  const auto running = [&] {
    std::vector<CUstream> streams;
    for (const Stream& stream : terms.streams()) {
      // What is captured does not run.
      if (!is_capturing(stream.handle)) streams.push_back(stream.handle);
    }
    return streams;
  };
  const std::vector<CUstream> streams = running();
  if (streams.size() > holds_.most_stops()) {
    // Each would block a hardware queue until none is left, and ours with them. That will not
    // change, so it is not tried again.
    throw Error(ErrorCode::out_of_memory,
                "cuda: while a graph is captured, or on a driver older than that of CUDA 12.5, " +
                    std::to_string(holds_.most_stops()) +
                    " streams can be held at a time, and there are " +
                    std::to_string(streams.size()));
  }
  await_backlog(streams, terms.patience);
  probe();
  watchdog_ = std::make_shared<CudaWatchdog>(holds_.flags(), number_);
  start_ = Clock::now();
  watch_for(kLongestStop, nullptr);
  submit(work);
  await_stops(stop(streams));
  for (CUstream stream : running()) {
    const bool is_stopped = std::find(streams.begin(), streams.end(), stream) != streams.end();
    if (!is_stopped) give_up(stream, "came to be known, or its capture ended, meanwhile");
  }
}

// Until they have done what they hold now.
void CudaHold::await_backlog(const std::vector<CUstream>& streams,
                             std::chrono::nanoseconds patience) const {
  const CudaDriver& driver = holds_.driver_;
  const auto deadline = Clock::now() + patience;
  for (CUstream stream : streams) {
    if (is_idle(stream)) continue;
    driver.check(driver.cuEventRecord_fn(holds_.event_, stream), "move (record)");
    for (;;) {
      const CUresult result = driver.cuEventQuery_fn(holds_.event_);
      if (result == CUDA_SUCCESS) break;
      if (result != CUDA_ERROR_NOT_READY) driver.check(result, "move (query)");
      if (Clock::now() >= deadline) give_up(stream, kRestless);
      std::this_thread::sleep_for(20us);
    }
  }
}

// The best moment to stop them is when they have just come to rest.
void CudaHold::await_lull(const std::vector<CUstream>& streams, std::chrono::nanoseconds lull) {
  const auto until = Clock::now() + lull;
  const auto are_idle = [&] {
    return std::all_of(streams.begin(), streams.end(), [this](CUstream s) { return is_idle(s); });
  };
  while (!are_idle() && Clock::now() < until) std::this_thread::yield();
}

// Whether what is submitted to our streams would run. To wait for it later might be for ever.
void CudaHold::probe() {
  CudaFlags& flags = holds_.flags();
  for (CUstream stream : {stream_, branch_}) {
    std::uint32_t& probed = stream == stream_ ? flags.probed : flags.branch_probed;
    queue(stream, "move (probe)", write_operation(probed, number_));
  }
  const auto deadline = Clock::now() + kLongestStop;
  while (!CudaFlags::holds(flags.probed, number_) ||
         !CudaFlags::holds(flags.branch_probed, number_)) {
    if (Clock::now() >= deadline) give_up(nullptr, kSlow);
    std::this_thread::yield();
  }
}

// Ahead of most stops: in a hardware queue it must not come behind one.
void CudaHold::submit(const Work& work) {
  CudaFlags& flags = holds_.flags();
  submitted_ = Submitted::part;
  queue(stream_, "move (start)", wait_operation(flags.go, number_),
        write_operation(flags.started, number_));
  work(*this);
  queue(stream_, "move (finish)", write_operation(flags.finished, number_),
        wait_operation(flags.gate, number_));
  submitted_ = Submitted::all;
  holds_.driver_.check(holds_.driver_.cuEventRecord_fn(holds_.event_, stream_), "move (record)");
}

void CudaHold::fork() {
  const CudaDriver& driver = holds_.driver_;
  driver.check(driver.cuEventRecord_fn(holds_.forked_, stream_), "move (fork)");
  driver.check(driver.cuStreamWaitEvent_fn(branch_, holds_.forked_, CU_EVENT_WAIT_DEFAULT),
               "move (fork)");
}

void CudaHold::join() {
  const CudaDriver& driver = holds_.driver_;
  driver.check(driver.cuEventRecord_fn(holds_.joined_, branch_), "move (join)");
  driver.check(driver.cuStreamWaitEvent_fn(stream_, holds_.joined_, CU_EVENT_WAIT_DEFAULT),
               "move (join)");
}

template <typename... Operations>
void CudaHold::queue(CUstream stream, const char* what, Operations... operations) {
  std::array all{operations...};
  holds_.driver_.check(holds_.driver_.cuStreamBatchMemOp_fn(stream, all.size(), all.data(), 0),
                       what);
}

void CudaHold::watch_for(std::chrono::nanoseconds time, CUstream for_whom) {
  if (!watchdog_->watch_for(time)) give_up(for_whom, kRestless);
}

// Those that are at work or may be at once.
std::vector<CUstream> CudaHold::active(const Terms& terms, bool patient_ones) const {
  std::vector<CUstream> result;
  for (const Stream& stream : terms.streams()) {
    if (stream.is_patient != patient_ones) continue;
    const bool is_at_work = !is_idle(stream.handle);
    const auto known = std::find(terms.active.begin(), terms.active.end(), stream.handle);
    if (is_at_work || known != terms.active.end()) result.push_back(stream.handle);
  }
  return result;
}

bool CudaHold::is_capturing(CUstream stream) const {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = holds_.driver_.cuStreamIsCapturing_fn(stream, &status);
  return result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT ||
         (result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE);
}

bool CudaHold::is_idle(CUstream stream) const {
  // To ask one that is captured would break the capture.
  if (is_capturing(stream)) give_up(stream, "is being captured");
  const CUresult result = holds_.driver_.cuStreamQuery_fn(stream);
  if (result == CUDA_ERROR_NOT_READY) return false;
  if (!is_gone(result)) holds_.driver_.check(result, "move (query)");
  return true;
}

std::vector<CudaHold::Stop> CudaHold::stop(const std::vector<CUstream>& streams) {
  const CudaDriver& driver = holds_.driver_;
  const auto flags = holds_.take_stops(streams.size());
  std::vector<Stop> stops;
  for (std::size_t i = 0; i < streams.size(); ++i) {
    std::array operations{write_operation(flags[i], number_),
                          wait_operation(holds_.flags().gate, number_)};
    const CUresult result =
        driver.cuStreamBatchMemOp_fn(streams[i], operations.size(), operations.data(), 0);
    if (is_gone(result)) continue;
    driver.check(result, "move (stop)");
    stops.push_back({streams[i], &flags[i]});
  }
  return stops;
}

void CudaHold::await_stops(std::vector<Stop> stops) {
  for (;;) {
    std::erase_if(stops, [this](Stop& stop) { return CudaFlags::holds(*stop.flag, number_); });
    if (stops.empty()) return;
    if (watchdog_->has_opened()) give_up(stops.front().stream, kRestless);
    std::this_thread::sleep_for(10us);
  }
}

// Streams that are announced meanwhile are waited for as well; whatever they are given from now on
// comes after the hold.
void CudaHold::await_rest(const Streams& streams, const std::vector<Stop>& stopped) {
  std::vector<CUstream> at_rest;
  const auto is_at_rest = [&](CUstream stream) {
    const auto stop = std::find_if(stopped.begin(), stopped.end(),
                                   [=](const Stop& known) { return known.stream == stream; });
    return stop != stopped.end() ? CudaFlags::holds(*stop->flag, number_) : is_idle(stream);
  };
  for (;;) {
    CUstream restless = nullptr;
    for (const Stream& stream : streams()) {
      // Once is enough.
      if (std::find(at_rest.begin(), at_rest.end(), stream.handle) != at_rest.end()) continue;
      if (is_at_rest(stream.handle)) {
        at_rest.push_back(stream.handle);
      } else {
        restless = stream.handle;
      }
    }
    if (restless == nullptr) return;
    if (watchdog_->has_opened()) give_up(restless, kRestless);
    std::this_thread::yield();
  }
}

void CudaHold::pause() {
  const auto waited = Clock::now() - since_;
  if (waited < kYielding) {
    std::this_thread::yield();
    return;
  }
  std::this_thread::sleep_for(20us);
  if (has_failed()) holds_.driver_.check(*failure_, "move");
  ask_device();
  if (waited > kNothingComes) {
    holds_.change_streams();
    throw Error(ErrorCode::busy, "cuda: streams were held, and the move did not get on");
  }
}

bool CudaHold::has_failed() const {
  return failure_ != nullptr && *failure_ != CUDA_SUCCESS;
}

// In another thread: it may get its answer no sooner than the hold is opened.
void CudaHold::ask_device() {
  const auto now = Clock::now();
  const bool is_asking = failure_ != nullptr && failure_.use_count() > 1;
  if (is_asking || now - std::max(since_, asked_at_) < kUntilAsked) return;
  asked_at_ = now;
  failure_ = std::make_shared<std::atomic<CUresult>>(CUDA_SUCCESS);
  Waiters::wait_for(
      [driver = &holds_.driver_, context = holds_.context_, stream = stream_, failure = failure_] {
        try {
          const CudaScope scope(*driver, context);
          const CUresult result = driver->cuStreamQuery_fn(stream);
          if (result != CUDA_SUCCESS && result != CUDA_ERROR_NOT_READY) *failure = result;
        } catch (const Error&) {
          *failure = CUDA_ERROR_UNKNOWN;
        }
      });
}

void CudaHold::give_up(CUstream stream, const char* why) {
  throw Restless(id_of(stream),
                 "cuda: streams could not be held: " +
                     (stream == nullptr ? "" : "stream " + std::to_string(id_of(stream)) + " ") +
                     why);
}

}  // namespace pgk
