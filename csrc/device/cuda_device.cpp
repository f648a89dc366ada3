#include "device/cuda_device.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/types.h"
#include "device/waiters.h"

namespace pgk {

CudaDevice::CudaDevice(int ordinal, std::size_t capacity)
    : driver_(CudaDriver::get()),
      mappings_(driver_),
      processors_(driver_),
      captures_(driver_),
      events_(driver_) {
  driver_.check(driver_.cuDeviceGet_fn(&ordinal_, ordinal), "cuDeviceGet");
  properties_.name = "cuda:" + std::to_string(ordinal);
  properties_.label = "GPU " + std::to_string(ordinal);

  memory_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  memory_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  memory_.location.id = ordinal_;
  mappings_.serve(ordinal_);
  driver_.check(driver_.cuMemGetAllocationGranularity_fn(&properties_.granularity, &memory_,
                                                         CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                "cuMemGetAllocationGranularity");

  std::size_t total = 0;
  driver_.check(driver_.cuDeviceTotalMem_fn(&total, ordinal_), "cuDeviceTotalMem");
  if (capacity == 0) capacity = total;
  properties_.capacity = capacity / properties_.granularity * properties_.granularity;
  if (capacity > total || properties_.capacity == 0) {
    throw Error(ErrorCode::invalid_value,
                properties_.name + ": a capacity of " + format_bytes(capacity) +
                    " is not between one page of " + format_bytes(properties_.granularity) +
                    " and the " + format_bytes(total) + " that the device has");
  }

  driver_.check(driver_.cuDevicePrimaryCtxRetain_fn(&context_, ordinal_),
                "cuDevicePrimaryCtxRetain");
  const Scope scope(*this);
  driver_.check(driver_.cuCtxGetStreamPriorityRange_fn(&properties_.least_priority,
                                                       &properties_.greatest_priority),
                "cuCtxGetStreamPriorityRange");
  processors_.divide(ordinal_);
  properties_.processor_groups = processors_.groups();
  properties_.why_undivided = properties_.name + ": " + processors_.why_undivided();
  properties_.default_stream = kDefaultStream;
  known_.add(kDefaultStream);
  prepare_moves();
}

// Streams and events stay: torch may hold raw handles of theirs.
CudaDevice::~CudaDevice() {
  try {
    const Scope scope(*this);
    mover_.reset();
  } catch (const Error&) {
    // The driver has been shut down, and what the mover has is gone.
  }
  driver_.cuDevicePrimaryCtxRelease_fn(ordinal_);
}

void CudaDevice::prepare_moves() {
  int has_memory_operations = 0;
  driver_.check(
      driver_.cuDeviceGetAttribute_fn(&has_memory_operations,
                                      CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, ordinal_),
      "cuDeviceGetAttribute");
  if (has_memory_operations == 0) return;
  // Drivers that do not know the question, and machines that have no answer, have a first node.
  int node = -1;
  const CUresult known =
      driver_.cuDeviceGetAttribute_fn(&node, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, ordinal_);
  if (known != CUDA_SUCCESS || node < 0) node = 0;
  std::vector<CUmemAllocationProp> working;
  // Memory of one node is created in half the time; the other kind may lie on any node.
  for (const auto type : {CU_MEM_LOCATION_TYPE_HOST_NUMA, CU_MEM_LOCATION_TYPE_HOST}) {
    CUmemAllocationProp kind{};
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location.type = type;
    kind.location.id = type == CU_MEM_LOCATION_TYPE_HOST_NUMA ? node : 0;
    host_memory_.assign(1, kind);
    try {
      do_release(do_create_host(properties_.granularity));
      working.push_back(kind);
    } catch (const Error&) {
      // Not every driver has every kind; without any, properties() says what does not work.
    }
  }
  host_memory_ = std::move(working);
  if (host_memory_.empty()) return;
  mover_ = std::make_unique<CudaMover>(driver_, context_, ordinal_, mappings_, captures_);
  properties_.can_move = properties_.can_hold = true;
  properties_.holds = CudaHolds::has_context_wait(driver_)
                          ? "all streams at once"
                          : "one stream after the other, " +
                                std::to_string(CudaHolds::most_stops()) +
                                " at most (for more, a driver of CUDA 12.5 or later)";
}

// Memory ---------------------------------------------------------------------------------------

Handle CudaDevice::do_create(std::size_t bytes) {
  const Scope scope(*this);
  const std::lock_guard lock(mutex_);
  if (bytes > properties_.capacity - created_bytes_) {
    throw Error(ErrorCode::device, properties_.name + ": create of " + format_bytes(bytes) +
                                       " failed: out of memory, " + format_bytes(created_bytes_) +
                                       " of " + format_bytes(properties_.capacity) + " exist");
  }
  CUmemGenericAllocationHandle handle{};
  driver_.check(driver_.cuMemCreate_fn(&handle, bytes, &memory_, 0), "create", bytes);
  created_bytes_ += bytes;
  return {handle, bytes, false};
}

Handle CudaDevice::do_create_host(std::size_t bytes) {
  const Scope scope(*this);
  if (mover_ != nullptr) mover_->prepare();  // most host memory is made ahead of the first move
  CUmemGenericAllocationHandle memory{};
  CUresult result = CUDA_ERROR_NOT_SUPPORTED;
  for (const CUmemAllocationProp& kind : host_memory_) {
    result = driver_.cuMemCreate_fn(&memory, bytes, &kind, 0);
    if (result == CUDA_SUCCESS) break;
  }
  driver_.check(result, "create_host", bytes);
  const Handle handle{memory, bytes, true};
  try {
    mappings_.alias_of(handle);  // to map it takes time as well
  } catch (const Error&) {
    driver_.cuMemRelease_fn(memory);
    throw;
  }
  return handle;
}

void CudaDevice::do_release(Handle handle) {
  const Scope scope(*this);
  mappings_.drop_alias(handle);
  driver_.check(driver_.cuMemRelease_fn(handle.id), "release", handle.bytes);
  if (handle.on_host) return;
  const std::lock_guard lock(mutex_);
  created_bytes_ -= handle.bytes;
}

std::size_t CudaDevice::free_bytes() {
  const Scope scope(*this);
  std::size_t free = 0;
  std::size_t total = 0;
  driver_.check(driver_.cuMemGetInfo_fn(&free, &total), "cuMemGetInfo");
  const std::lock_guard lock(mutex_);
  return std::min(free, properties_.capacity - created_bytes_);
}

Address CudaDevice::do_reserve(std::size_t bytes, std::size_t alignment) {
  const Scope scope(*this);
  CUdeviceptr address = 0;
  driver_.check(driver_.cuMemAddressReserve_fn(&address, bytes, alignment, 0, 0), "reserve", bytes);
  if (address % alignment != 0) {
    driver_.cuMemAddressFree_fn(address, bytes);
    throw Error(ErrorCode::device, properties_.name + ": reserve of " + format_bytes(bytes) +
                                       " failed: the driver ignored the alignment of " +
                                       format_bytes(alignment));
  }
  return address;
}

void CudaDevice::do_unreserve(Address address, std::size_t bytes) {
  const Scope scope(*this);
  driver_.check(driver_.cuMemAddressFree_fn(address, bytes), "unreserve", bytes);
}

void CudaDevice::do_map(Address address, Handle handle) {
  const Scope scope(*this);
  driver_.check(mappings_.map(address, handle), "map", handle.bytes);
}

void CudaDevice::do_unmap(Address address, Handle handle) {
  const Scope scope(*this);
  driver_.check(mappings_.unmap(address, handle), "unmap", handle.bytes);
}

void CudaDevice::do_move(std::span<Move> moves, const Manner& manner) {
  if (mover_ == nullptr) {
    throw Error(ErrorCode::device,
                properties_.name + ": move failed: the driver cannot map host memory");
  }
  const Scope scope(*this);
  mover_->move(moves, manner,
               {.begin = [this](std::size_t bytes) { begin(Call::move, bytes); },
                .streams = [&] { return streams_to_hold(manner); }});
}

// Contexts that matter more have streams of a higher priority.
std::vector<CudaHold::Stream> CudaDevice::streams_to_hold(const Manner& manner) const {
  const std::vector<StreamId> known = known_.all();
  std::vector<CudaHold::Stream> streams;
  streams.reserve(known.size());
  const std::lock_guard lock(streams_mutex_);
  for (const StreamId stream : known) {
    const auto own = streams_.find(stream);
    const bool matters =
        own != streams_.end() && own->second.priority < properties_.least_priority &&
        std::find(manner.own.begin(), manner.own.end(), stream) == manner.own.end();
    streams.push_back({handle_of(stream), !matters});
  }
  return streams;
}

void* CudaDevice::allocate_plain(std::size_t bytes) {
  const Scope scope(*this);
  CUdeviceptr address = 0;
  const CUresult result = driver_.cuMemAlloc_fn(&address, bytes);
  return result == CUDA_SUCCESS ? reinterpret_cast<void*>(address) : nullptr;
}

void CudaDevice::free_plain(void* pointer) {
  const Scope scope(*this);
  driver_.check(driver_.cuMemFree_fn(reinterpret_cast<CUdeviceptr>(pointer)), "free");
}

}  // namespace pgk
