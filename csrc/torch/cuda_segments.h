// Segments of torch's private pools as the memory of contexts.
//
// Native calls a provider under its own lock, so providers never take the GIL. Neither taking a
// segment waits, nor giving one back: what any stream may still do with it is waited for by who
// needs it.
#pragma once

#include <torch/csrc/cuda/CUDAPluggableAllocator.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>

#include "core/context.h"
#include "device/cuda_device.h"

namespace pgk {

// Idle memory of the context that any stream may use. Null if it cannot be had without waiting.
void* take_segment(Context& context, std::size_t bytes);
void give_back_segment(Context& context, void* pointer);
// What native asks for to serve a request of `bytes` from an empty pool.
std::size_t segment_bytes_for(std::size_t bytes);
// The context of the calling thread's session, or of the work that it does for others; null if
// that is none on the device, or has been destroyed.
std::shared_ptr<Context> working_context(int ordinal);

// What native takes a pool's segments from.
class SegmentProvider final : public torch::cuda::CUDAPluggableAllocator::CUDAPluggableAllocator {
 public:
  explicit SegmentProvider(std::shared_ptr<CudaDevice> device);

  void* raw_alloc(std::size_t bytes) override;
  void* raw_alloc_with_stream(std::size_t bytes, cudaStream_t /*stream*/) override {
    return raw_alloc(bytes);
  }
  void raw_delete(void* pointer) override;
  std::string name() override { return "pygpukit_torch segments"; }

  CudaDevice& device() const { return *device_; }
  int ordinal() const { return device_->ordinal(); }
  // How many segments the pool has.
  std::size_t count() const { return count_; }

 private:
  std::shared_ptr<CudaDevice> device_;
  std::atomic<std::size_t> count_{0};
};

}  // namespace pgk
