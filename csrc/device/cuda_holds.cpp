#include "device/cuda_holds.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace pgk {

CudaHolds::CudaHolds(const CudaDriver& driver, CUcontext context)
    : driver_(driver), context_(context) {
  void* memory = nullptr;
  driver_.check(driver_.cuMemHostAlloc_fn(&memory, sizeof(CudaFlags), CU_MEMHOSTALLOC_DEVICEMAP),
                "flags", sizeof(CudaFlags));
  std::memset(memory, 0, sizeof(CudaFlags));
  flags_ = static_cast<CudaFlags*>(memory);
  CUresult result = CUDA_SUCCESS;
  for (CUstream& stream : streams_) {
    if (result != CUDA_SUCCESS) break;
    result = driver_.cuStreamCreateWithPriority_fn(&stream, CU_STREAM_NON_BLOCKING, 0);
  }
  for (CUevent* event : {&event_, &forked_, &joined_}) {
    if (result != CUDA_SUCCESS) break;
    result = driver_.cuEventCreate_fn(event, CU_EVENT_DISABLE_TIMING);
  }
  if (result != CUDA_SUCCESS) release();
  driver_.check(result, "create_stream");
}

CudaHolds::~CudaHolds() {
  release();
}

void CudaHolds::release() {
  for (CUevent event : {event_, forked_, joined_}) {
    if (event != nullptr) driver_.cuEventDestroy_fn(event);
  }
  for (CUstream stream : streams_) {
    if (stream != nullptr) driver_.cuStreamDestroy_fn(stream);
  }
  driver_.cuMemFreeHost_fn(flags_);
}

// The driver reads the variable when CUDA is initialized; 8 is its default.
std::size_t CudaHolds::most_stops() {
  static const std::size_t queues = [] {
    const char* set = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    const int number = set == nullptr ? 0 : std::atoi(set);
    return static_cast<std::size_t>(number < 1 || number > 32 ? 8 : number);
  }();
  return queues - std::min<std::size_t>(queues, 3);
}

std::span<std::uint32_t> CudaHolds::take_stops(std::size_t count) {
  if (next_stop_ + count > CudaFlags::kStops) next_stop_ = 0;
  const std::span<std::uint32_t> stops(flags_->stopped.data() + next_stop_, count);
  next_stop_ += count;
  return stops;
}

}  // namespace pgk
