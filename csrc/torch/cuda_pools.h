// Private pools of torch's native allocator: those of CUDA graphs, of reduce-overhead, and
// MemPools. Native keeps serving them, since a graph's addresses must stay its own; but a pool that
// is made in a session takes its segments from the context, so that they are charged to it, and
// gives them back when the last graph is gone.
//
// Native calls a pool's provider under its own lock. So nothing here calls native with a lock of a
// context or a manager held, and providers never take the GIL. Taking a segment does not wait;
// giving one back waits for the device, as native's own cudaFree does there.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/context.h"
#include "device/cuda_device.h"

namespace pgk {

// Idle memory of the context that any stream may use. Null if it cannot be had without waiting.
void* take_segment(Context& context, std::size_t bytes);
// Work on any stream may still use it: waits for the device, as native's cudaFree does. During a
// capture, when that is forbidden, the segment is kept back until all known streams have passed.
void give_back_segment(Context& context, void* pointer);
// What native asks for to serve a request of `bytes` from an empty pool.
std::size_t segment_bytes_for(std::size_t bytes);

class CudaPools {
 public:
  using Native = c10::cuda::CUDACachingAllocator::CUDAAllocator;
  using Filter = std::function<bool(cudaStream_t)>;

  explicit CudaPools(Native* native) : native_(native) {}

  // Whether some thread allocates to a pool, captures included.
  static bool in_use() { return begun_.load(std::memory_order_relaxed) != 0; }
  // Whether native has to serve the calling thread's request on `stream` from a pool.
  bool takes(cudaStream_t stream) const { return in_use() && find(stream) != nullptr; }
  // The context that provides for that pool; null if none does.
  std::shared_ptr<Context> provider_of(cudaStream_t stream) const;

  // As native's functions of these names; `context` is that of the calling thread's session, and
  // `served` the device whose moves have to keep away from a capture, null if there is none.
  void begin(c10::DeviceIndex device, c10::MempoolId_t id, Filter filter,
             const std::shared_ptr<Context>& context, const std::shared_ptr<CudaDevice>& served);
  void end(c10::DeviceIndex device, c10::MempoolId_t id);
  void create(c10::DeviceIndex device, c10::MempoolId_t id, std::shared_ptr<Native> allocator,
              const std::shared_ptr<Context>& context);
  void release(c10::DeviceIndex device, c10::MempoolId_t id);

  // Takes back what pools hold that were released. Returns whether there are any.
  bool empty_released();

  // Whether a pool is in use, so that a graph may keep addresses of torch's own buffers.
  bool any() const;

 private:
  class Provider;
  struct Bound {
    std::shared_ptr<Provider> provider;
    bool has_own_reference = false;  // beside those that graphs have
  };
  // A capture that a device's moves keep away from.
  struct Capture {
    std::shared_ptr<CudaDevice> device;
    StreamId stream = kNoStream;

    Capture(std::shared_ptr<CudaDevice> device, StreamId stream);
    ~Capture() { device->end_capture(stream); }
    Capture(const Capture&) = delete;
    Capture& operator=(const Capture&) = delete;
  };
  struct Begun {
    c10::MempoolId_t id;
    Filter filter;
    std::shared_ptr<Capture> capture;  // null for MemPools
  };
  struct Released {
    c10::MempoolId_t id;
    std::shared_ptr<Provider> provider;
  };

  const Begun* find(cudaStream_t stream) const;
  int use_count(c10::DeviceIndex device, c10::MempoolId_t id) const;

  static inline std::atomic<int> begun_{0};

  Native* native_;
  // Recursive: filters are torch's, and may allocate.
  mutable std::recursive_mutex mutex_;
  std::vector<Begun> captures_;
  std::map<c10::MempoolId_t, int> references_;  // of every pool, as far as they were made here
  std::map<c10::MempoolId_t, Bound> bound_;
  std::vector<Released> released_;
};

}  // namespace pgk
