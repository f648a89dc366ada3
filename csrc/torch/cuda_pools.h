// Private pools of torch's native allocator: those of CUDA graphs, of reduce-overhead, and
// MemPools. Native keeps serving them, since a graph's addresses must stay its own. Where their
// memory comes from is decided here: each segment from the context of the session or the work that
// needs it, outside of these from the device. So it does not matter where a pool was made, nor
// whether that context still lives.
//
//   made     by create() or the first begin(); it gets a provider
//   begun    by begin(), until end(): native serves a thread, a stream or a capture from it
//   released when nobody has a reference any more; native's cache of it is emptied
//   gone     when no segment is left
//
// Native calls a pool's provider under its own lock. So nothing here calls native with a lock of a
// context or a manager held.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/context.h"
#include "device/cuda_device.h"
#include "torch/cuda_segments.h"

namespace pgk {

class CudaPools {
 public:
  using Native = c10::cuda::CUDACachingAllocator::CUDAAllocator;
  using Filter = std::function<bool(cudaStream_t)>;
  using Id = c10::MempoolId_t;

  // A capture as torch announced it, for whoever learns that it failed.
  struct Announced {
    c10::DeviceIndex device = 0;
    Id id;
    std::uint64_t number = 0;
    StreamId stream = kNoStream;
    bool is_first = true;  // nothing was captured on the stream then
    std::shared_ptr<CudaDevice> on;
  };

  explicit CudaPools(Native* native) : native_(native) {}

  // Whether some thread allocates to a pool, captures included.
  static bool in_use() { return begun_.load(std::memory_order_relaxed) != 0; }
  // Whether native has to serve the calling thread's request on `stream` from a pool, and not the
  // context. In a session of the context no lock is taken for its own stream, unless a pool was
  // begun in the context. (Outside of sessions that stream may have joined a capture.)
  bool takes(Context& context, StreamId stream, bool in_session) const {
    const bool is_its_own = in_session && stream == context.stream();
    return in_use() && (!is_its_own || context.begun_pools() != 0 || is_threads()) &&
           find(stream) != nullptr;
  }
  // Who has to make room for what such a pool needs; null if nobody can.
  std::shared_ptr<Context> payer_of(StreamId stream) const;

  // As native's functions of these names. `context` is that of the calling thread's session, and
  // `served` the device whose contexts provide, null if there is none.
  void begin(c10::DeviceIndex device, Id id, Filter filter, const std::shared_ptr<Context>& context,
             const std::shared_ptr<CudaDevice>& served);
  void end(c10::DeviceIndex device, Id id);
  void create(c10::DeviceIndex device, Id id, std::shared_ptr<Native> allocator,
              const std::shared_ptr<CudaDevice>& served);
  // Returns the contexts in which something was captured that is gone by this. To be followed by
  // empty_released().
  std::vector<std::shared_ptr<Context>> release(c10::DeviceIndex device, Id id);

  // The capture that the calling thread began last, once. Forgotten with the next.
  static std::optional<Announced> take_announced();
  // Ends what its graph will not end any more. As release().
  std::vector<std::shared_ptr<Context>> abandon(const Announced& capture);
  // Whether it was begun and not yet ended.
  bool is_begun(const Announced& capture) const;

  // Takes back what pools hold that were released, unless something is captured. Returns whether
  // anything came back.
  bool empty_released();
  // What pools in use keep of the context's memory and have not handed out, in bytes. Slow.
  std::size_t unused_bytes_of(const Context& context) const;
  // As native's function of this name.
  void set_use_on_oom(c10::DeviceIndex device, Id id, bool use);
  // A block for a request that the context cannot serve, out of what its pools that are to be used
  // on OOM keep. Null if none has one. Slow.
  void* from_last_resort(const Context& context, std::size_t bytes, StreamId stream);
  // Whether native may serve any stream from a context's memory, for want of other memory.
  bool has_last_resorts() const { return last_resorts_.load(std::memory_order_relaxed) != 0; }
  // Whether graphs may keep addresses of torch's own buffers in the context.
  bool has_captured(const Context& context) const;

 private:
  using Key = std::pair<c10::DeviceIndex, Id>;
  struct Pool {
    std::shared_ptr<SegmentProvider> provider;  // null if native takes memory of its own
    int references = 0;  // of graphs, MemPools and threads, as far as they are known
    bool use_on_oom = false;
    std::vector<std::shared_ptr<Context>> captured_in;
  };
  // A capture that a device's moves keep away from.
  struct Capture {
    std::shared_ptr<CudaDevice> device;
    std::uint64_t number = 0;

    Capture(std::shared_ptr<CudaDevice> device, StreamId stream);
    ~Capture() { device->end_capture(number); }
    Capture(const Capture&) = delete;
    Capture& operator=(const Capture&) = delete;
  };
  // That the requests of a context, or of a thread, have to be looked at.
  class Mark {
   public:
    explicit Mark(std::shared_ptr<std::atomic<int>> count) : count_(std::move(count)) {
      count_->fetch_add(1);
    }
    Mark(Mark&& other) = default;
    Mark& operator=(Mark&&) = delete;
    ~Mark() {
      if (count_) count_->fetch_sub(1);
    }

   private:
    std::shared_ptr<std::atomic<int>> count_;
  };
  struct Begun {
    Key key;
    std::uint64_t number = 0;
    Filter filter;
    bool is_capture = false;
    std::shared_ptr<Capture> capture;  // null for MemPools, and where nobody moves
    std::vector<Mark> marks;
  };
  struct Released {
    Key key;
    std::shared_ptr<SegmentProvider> provider;
  };

  static bool is_threads();
  static Mark mark_of(const std::shared_ptr<Context>& context);
  static Mark mark_of_thread();

  const Begun* find(StreamId stream) const;
  int use_count(const Key& key) const;
  bool provide(const Key& key, const std::shared_ptr<CudaDevice>& served);
  std::vector<Begun> forget(const Key& key);
  bool is_begun(const Key& key) const;
  bool is_captured() const;
  std::unique_lock<std::recursive_mutex> wait_for_last_resort() const;
  std::vector<Key> last_resorts(const Context& context);

  static inline std::atomic<int> begun_{0};

  Native* native_;
  // Recursive: filters are torch's, and may allocate.
  mutable std::recursive_mutex mutex_;
  std::vector<Begun> begun_pools_;
  std::map<Key, Pool> pools_;
  std::vector<Released> released_;
  std::atomic<std::size_t> released_count_{0};
  std::atomic<int> last_resorts_{0};
  // Python may run while these are held, so nobody waits for them with the GIL. One thread at a
  // time empties pools, and one serves from a last resort, which nobody else may begin meanwhile.
  std::recursive_mutex emptying_;
  mutable std::recursive_mutex last_resort_;
  std::uint64_t next_number_ = 1;
};

}  // namespace pgk
