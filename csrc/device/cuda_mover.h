// Exchanges the memory behind addresses that may be in use.
//
// Between unmap and map a touch of the address would kill the process, and a write between copy and
// map would be lost. So pages are remapped while everybody's streams are held (cuda_hold.h): all
// earlier work is done, none of the later has begun. Our stream does meanwhile what has to be
// done then, and tells of each page when it is. For a page whose contents host memory is known to
// have had, be it from before or from a copy ahead (cuda_staging.h), that is a comparison; for
// others it is the copy. A page is remapped at once, beside the copies of the next ones, then the
// streams go on. From the first stop until then one rule holds: nothing is submitted, no device
// memory is allocated, and no lock is taken that another thread could have while it waits for the
// device. Where others are at work, holds are short, and far enough from each other.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "device/cuda_captures.h"
#include "device/cuda_driver.h"
#include "device/cuda_fingerprint.h"
#include "device/cuda_hold.h"
#include "device/cuda_mappings.h"
#include "device/cuda_staging.h"
#include "device/device.h"

namespace pgk {

// The device's context must be current in all calls, and relaxed capture mode.
class CudaMover {
 public:
  // What a move asks of the device that it is for.
  struct Asks {
    // Before a page is remapped; should it throw, neither that page nor a later one is.
    std::function<void(std::size_t bytes)> begin;
    CudaHold::Streams streams;
  };

  CudaMover(const CudaDriver& driver, CUcontext context, CUdevice ordinal, CudaMappings& mappings,
            CudaCaptures& captures);

  // Compiles the kernel of comparisons, which takes some tenths of a second, unless it has been.
  void prepare();
  // Device::move(), prepared or not. One call at a time, others wait for it, no longer than for
  // streams; none of them has a lock meanwhile that it could need.
  void move(std::span<Move> moves, const Manner& manner, const Asks& asks);

 private:
  using Queue = std::deque<Move*>;
  // What is left to do.
  struct Left {
    Queue known;    // to be compared with what they say themselves
    Queue outs;     // to be copied ahead
    Queue changed;  // to be copied within a hold
    Queue ins;

    bool is_empty() const {
      return known.empty() && outs.empty() && changed.empty() && ins.empty();
    }
  };
  // A page's part of a hold.
  struct Step {
    Move* move = nullptr;
    // Of what `to` holds: the page is remapped if it has the same, else it is left.
    std::optional<Fingerprint> expected;
    bool copied = false;
  };
  // Steps that become ready in this order.
  using Lane = std::vector<Step>;
  // One for comparisons and one for the copies of each direction.
  enum Kind : std::size_t { kCompared, kOut, kIn };
  using Batch = std::array<Lane, CudaFlags::kLanes>;

  Left sort(std::span<Move> moves) const;
  std::size_t batch() const;
  std::size_t copied_batch(bool brings_in) const;
  void copy_ahead(Left& left);
  Batch next_batch(Left& left);
  void take_copied(Lane& lane, std::size_t limit);
  void carry_out(const Batch& batch, const Manner& manner, const Asks& asks);
  void hold_for(const Batch& batch, const Manner& manner, const Asks& asks,
                std::chrono::nanoseconds lull, std::vector<CUstream>& active);
  void finish_steps(CudaHold& hold, std::uint32_t number, const Batch& batch, const Asks& asks);
  void queue_steps(CudaHold& hold, const Batch& batch, std::uint32_t number);
  void queue_copies(CUstream stream, const Batch& batch, Kind lane, std::uint32_t number);
  void tell_of(CUstream stream, Kind lane, std::size_t i, Address address, std::size_t bytes,
               std::uint32_t number);
  bool tells_contents(const Move& move) const;
  void finish(const Step& step, const Fingerprint& contents, const Asks& asks);
  void remap(Move& move, const Asks& asks);

  const CudaDriver& driver_;
  CUdevice ordinal_;
  CudaMappings& mappings_;
  CudaCaptures& captures_;
  std::timed_mutex mutex_;
  CudaHolds holds_;
  // By the last hold, and by the last look:
  bool is_waited_for_ = false;  // streams at work
  bool is_gentle_ = false;      // since others are at work
  CudaStaging staging_;
  std::mutex preparing_;
  std::optional<CudaFingerprint> fingerprint_;  // once prepared
};

}  // namespace pgk
