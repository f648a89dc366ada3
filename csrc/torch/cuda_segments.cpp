#include "torch/cuda_segments.h"

#include <utility>

#include "core/address_table.h"
#include "core/blocking.h"
#include "core/error.h"
#include "core/session.h"
#include "torch/cuda_report.h"
#include "torch/cuda_streams.h"

namespace pgk {
namespace {

// The sizes of native's segments (c10/cuda/CUDACachingAllocator.cpp).
constexpr std::size_t kSmallRequest = MiB;
constexpr std::size_t kSmallSegment = 2 * MiB;
constexpr std::size_t kLargeRequest = 10 * MiB;
constexpr std::size_t kLargeSegment = 20 * MiB;

}  // namespace

void* take_segment(Context& context, std::size_t bytes) {
  void* pointer = nullptr;
  try {
    pointer = context.try_allocate(bytes, kNoStream, Effort::ready);
  } catch (const Error&) {
    return nullptr;  // a context that is no longer open provides nothing
  }
  if (pointer != nullptr) context.count_segment(pointer, /*taken=*/true);
  return pointer;
}

void give_back_segment(Context& context, void* pointer) {
  context.count_segment(pointer, /*taken=*/false);
  CudaDevice& device = cuda_device(context);
  try {
    // Any stream may have replayed a graph.
    if (const auto event = device.record_all()) {
      context.free_after(pointer, *event);
      return;
    }
  } catch (const Error&) {
    // A capture that torch does not know of.
  }
  device.announce(current_cuda_stream(device.ordinal()));
  context.free_after(pointer, device.known_streams());
}

std::size_t segment_bytes_for(std::size_t bytes) {
  if (bytes <= kSmallRequest) return kSmallSegment;
  if (bytes < kLargeRequest) return kLargeSegment;
  return round_up(bytes, kSmallSegment);
}

std::shared_ptr<Context> working_context(int ordinal) {
  const Context* current = current_context();
  auto context = current == nullptr ? context_of_work(current_cuda_stream(ordinal))
                                    : std::const_pointer_cast<Context>(current->shared_from_this());
  const bool is_on_device = context && context->is_open() && !context->is_on_host() &&
                            cuda_device(*context).ordinal() == ordinal;
  return is_on_device ? context : nullptr;
}

SegmentProvider::SegmentProvider(std::shared_ptr<CudaDevice> device)
    : CUDAPluggableAllocator([](std::size_t, int, cudaStream_t) -> void* { return nullptr; },
                             [](void*, std::size_t, int, cudaStream_t) {}),
      device_(std::move(device)) {}

void* SegmentProvider::raw_alloc(std::size_t bytes) {
  const auto context = working_context(device_->ordinal());
  void* pointer = context ? take_segment(*context, bytes) : device_->allocate_plain(bytes);
  if (pointer != nullptr) ++count_;
  return pointer;
}

void SegmentProvider::raw_delete(void* pointer) {
  if (Context* owner = AddressTable::segment_owner_of(pointer)) {
    give_back_segment(*owner, pointer);
  } else {
    device_->free_plain(pointer);
  }
  --count_;
}

}  // namespace pgk
