// Exchanges the memory behind addresses that may be in use.
//
// Between unmap and map a touch of the address would kill the process, and a write between copy and
// map would be lost. So the copies of a batch of pages are one graph on the default stream, which
// tells of each page when it is copied and stops at its end: all earlier work is done, none of the
// later has begun. A page is remapped as soon as it is copied, beside the copies of the next ones,
// then the stream goes on. From the launch until then one rule holds (cuda_hold.h says why):
// nothing is submitted, no device memory is allocated, and no lock is taken that another thread
// could have while it waits for the device.
#pragma once

#include <array>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "device/cuda_driver.h"
#include "device/cuda_fingerprint.h"
#include "device/cuda_graph.h"
#include "device/cuda_hold.h"
#include "device/cuda_mappings.h"
#include "device/device.h"

namespace pgk {

// The device's context must be current in all calls, and relaxed capture mode.
class CudaMover {
 public:
  // Called before a page is remapped; should it throw, neither that page nor a later one is.
  using Begin = std::function<void(std::size_t bytes)>;

  CudaMover(const CudaDriver& driver, CUcontext context, CUdevice ordinal, CudaMappings& mappings);

  // Device::move(); the first call also compiles a kernel. One call at a time, others wait for it;
  // none of them has a lock meanwhile that it could need. `held` are different streams, without the
  // default one.
  void move(std::span<Move> moves, std::span<const CUstream> held, const Begin& begin);

 private:
  // Moves of a batch whose pages become ready in this order; one for each direction.
  using Lane = std::span<Move* const>;
  using Lanes = std::array<Lane, CudaFlags::kLanes>;

  void move_unchanged(Lane batch, std::span<const CUstream> held, const Begin& begin,
                      std::vector<Move*>& changed);
  void copy_and_move(Lane outs, Lane ins, std::span<const CUstream> held, const Begin& begin);
  template <typename OnReady>
  void run(CudaGraph& graph, std::uint32_t number, const Lanes& lanes,
           std::span<const CUstream> held, const OnReady& on_ready);
  void remap(Move& move, const Begin& begin);

  const CudaDriver& driver_;
  CUdevice ordinal_;
  CudaMappings& mappings_;
  std::mutex mutex_;
  CudaHolds holds_;
  std::optional<CudaFingerprint> fingerprint_;
};

}  // namespace pgk
