#include "device/cuda_hold.h"

#include <cstring>
#include <string>
#include <thread>

#include "core/error.h"
#include "device/cuda_graph.h"
#include "device/waiters.h"

namespace pgk {
namespace {

using namespace std::chrono_literals;

// Far longer than the submissions take that it stands for, and short enough for those held up.
constexpr auto kLongestStop = 50ms;
// For streams whose work waits for something that will not come as long as others are stopped.
constexpr auto kLongestWait = 1s;
constexpr auto kYielding = 200us;
// Work ahead of a graph may take that long. But if the device has failed, no flag will ever tell.
constexpr auto kUntilAsked = 1s;

void open_gate(CudaFlags& flags, std::uint32_t number) {
  std::atomic_ref(flags.gate).store(number, std::memory_order_release);
}

}  // namespace

// Watchdog -------------------------------------------------------------------------------------

void CudaWatchdog::start() {
  Waiters::wait_for([self = shared_from_this()] { self->watch(); });
}

bool CudaWatchdog::stop() {
  {
    const std::lock_guard lock(mutex_);
    watching_ = false;
  }
  changed_.notify_one();
  return !has_opened();
}

void CudaWatchdog::watch() {
  std::unique_lock lock(mutex_);
  while (watching_) {
    if (must_open()) {
      opened_.store(true, std::memory_order_release);
      open_gate(flags_, number_);
      return;
    }
    changed_.wait_for(lock, 1ms);
  }
}

bool CudaWatchdog::must_open() {
  const auto now = Clock::now();
  if (now - started_at_ > kLongestWait) return true;
  if (stopped_at_) return now - *stopped_at_ > kLongestStop;
  for (std::uint32_t& flag : stopped_) {
    if (CudaFlags::holds(flag, number_)) stopped_at_ = now;
  }
  return false;
}

// What holds need ------------------------------------------------------------------------------

CudaHolds::CudaHolds(const CudaDriver& driver, CUcontext context)
    : driver_(driver), context_(context) {
  void* memory = nullptr;
  driver_.check(driver_.cuMemHostAlloc_fn(&memory, sizeof(CudaFlags), CU_MEMHOSTALLOC_DEVICEMAP),
                "flags", sizeof(CudaFlags));
  std::memset(memory, 0, sizeof(CudaFlags));
  flags_ = static_cast<CudaFlags*>(memory);
  CUresult result = driver_.cuStreamCreateWithPriority_fn(&stream_, CU_STREAM_NON_BLOCKING, 0);
  if (result == CUDA_SUCCESS) {
    result = driver_.cuEventCreate_fn(&event_, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC);
    if (result != CUDA_SUCCESS) driver_.cuStreamDestroy_fn(stream_);
  }
  if (result != CUDA_SUCCESS) driver_.cuMemFreeHost_fn(flags_);
  driver_.check(result, "create_stream");
}

CudaHolds::~CudaHolds() {
  driver_.cuEventDestroy_fn(event_);
  driver_.cuStreamDestroy_fn(stream_);
  driver_.cuMemFreeHost_fn(flags_);
}

std::span<std::uint32_t> CudaHolds::take_stops(std::size_t count) {
  if (count > CudaFlags::kStops) {
    throw Error(ErrorCode::invalid_value,
                "cuda: " + std::to_string(count) + " streams are too many to be held at a time");
  }
  if (next_stop_ + count > CudaFlags::kStops) next_stop_ = 0;
  const std::span<std::uint32_t> stops(flags_->stopped.data() + next_stop_, count);
  next_stop_ += count;
  return stops;
}

// A hold ---------------------------------------------------------------------------------------

CudaHold::~CudaHold() {
  open_gate(holds_.flags(), number_);
  if (watchdog_ != nullptr) watchdog_->stop();
  try {
    while (launched_ && !CudaFlags::holds(holds_.flags().finished, number_)) pause();
  } catch (const Error&) {
    // A device that has failed runs nothing.
  }
}

void CudaHold::launch(CUgraphExec graph, std::span<const CUstream> streams) {
  const CudaDriver& driver = holds_.driver_;
  refuse_capture(CU_STREAM_LEGACY);
  for (CUstream stream : streams) refuse_capture(stream);
  if (!streams.empty()) {
    // What a first launch would have to do.
    driver.check(driver.cuGraphUpload_fn(graph, holds_.stream_), "move (upload)");
    driver.check(driver.cuStreamSynchronize_fn(holds_.stream_), "move (upload)");
    stop(streams);
  }
  const CUresult result = driver.cuGraphLaunch_fn(graph, CU_STREAM_LEGACY);
  launched_ = result == CUDA_SUCCESS;
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) give_up("a capture depends on it");
  driver.check(result, "move (launch)");
  renew();
  if (watchdog_ == nullptr) return;
  await(holds_.flags().started);
  if (!watchdog_->stop()) give_up("streams were stopped for too long");
}

void CudaHold::refuse_capture(CUstream stream) const {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = holds_.driver_.cuStreamIsCapturing_fn(stream, &status);
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT || status != CU_STREAM_CAPTURE_STATUS_NONE) {
    give_up("a stream is being captured");
  }
  holds_.driver_.check(result, "move (query)");
}

void CudaHold::stop(std::span<const CUstream> streams) {
  const CudaDriver& driver = holds_.driver_;
  // Streams that have much to do would leave the others standing meanwhile.
  const auto drain = [&](CUstream stream) {
    driver.check(driver.cuEventRecord_fn(holds_.event_, stream), "move (record)");
    driver.check(driver.cuEventSynchronize_fn(holds_.event_), "move (synchronize)");
  };
  drain(CU_STREAM_LEGACY);
  for (CUstream stream : streams) drain(stream);

  const auto flags = holds_.take_stops(streams.size());
  watchdog_ = std::make_shared<CudaWatchdog>(holds_.flags(), number_, flags);
  watchdog_->start();
  for (std::size_t i = 0; i < streams.size(); ++i) {
    auto operations = stop_operations(CudaFlags::address_of(flags[i]),
                                      CudaFlags::address_of(holds_.flags().gate), number_);
    driver.check(driver.cuStreamBatchMemOp_fn(streams[i], operations.size(), operations.data(), 0),
                 "move (stop)");
  }
  for (std::uint32_t& flag : flags) await(flag);
}

void CudaHold::await(std::uint32_t& flag) {
  for (renew(); !CudaFlags::holds(flag, number_); pause()) {
    if (watchdog_->has_opened()) give_up("streams were stopped for too long");
  }
}

void CudaHold::pause() {
  const auto waited = Clock::now() - since_;
  if (waited < kYielding) {
    std::this_thread::yield();
    return;
  }
  std::this_thread::sleep_for(20us);
  if (failure_ != nullptr && *failure_ != CUDA_SUCCESS) {
    holds_.driver_.check(*failure_, "move");
  }
  if (waited > kUntilAsked) {
    ask_device();
    renew();
  }
}

// In another thread: it may get its answer no sooner than the gate is open.
void CudaHold::ask_device() {
  if (failure_ != nullptr && failure_.use_count() > 1) return;
  failure_ = std::make_shared<std::atomic<CUresult>>(CUDA_SUCCESS);
  Waiters::wait_for([driver = &holds_.driver_, context = holds_.context_, failure = failure_] {
    try {
      const CudaScope scope(*driver, context);
      const CUresult result = driver->cuStreamQuery_fn(CU_STREAM_LEGACY);
      const bool works = result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY ||
                         result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
      if (!works) *failure = result;
    } catch (const Error&) {
      *failure = CUDA_ERROR_UNKNOWN;
    }
  });
}

void CudaHold::give_up(const char* why) const {
  throw Error(ErrorCode::busy, std::string("cuda: the streams could not be held: ") + why);
}

}  // namespace pgk
