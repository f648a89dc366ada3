// What the CPU and the device tell each other during moves. It lies in pinned memory, which has the
// same address for both. Flags hold the number of the last hold that wrote them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace pgk {

struct CudaFlags {
  static constexpr std::size_t kLanes = 3;
  static constexpr std::size_t kPages = 16;  // of a lane
  static constexpr std::size_t kStops = 1024;

  alignas(64) std::uint32_t go;
  std::uint32_t gate;
  alignas(64) std::uint32_t probed;  // our stream gets on
  std::uint32_t branch_probed;       // and its branch
  std::uint32_t started;             // our work has seen `go`
  std::uint32_t finished;            // nothing of it runs any more
  std::array<std::array<std::uint32_t, kPages>, kLanes> ready;
  alignas(64) std::array<std::array<Fingerprint, kPages>, kLanes> contents;
  alignas(64) std::array<Fingerprint, kPages> staged;  // what was copied ahead of a hold
  // Of streams, used in turn: a flag may be written long after the hold it was for was given up.
  alignas(64) std::array<std::uint32_t, kStops> stopped;

  template <typename T>
  static CUdeviceptr address_of(const T& member) {
    return reinterpret_cast<CUdeviceptr>(&member);
  }
  static bool holds(std::uint32_t& flag, std::uint32_t number) {
    return std::atomic_ref(flag).load(std::memory_order_acquire) == number;
  }
  // Whoever comes late with an older number changes nothing.
  static void raise(std::uint32_t& flag, std::uint32_t number) {
    std::atomic_ref atomic(flag);
    std::uint32_t before = atomic.load(std::memory_order_relaxed);
    while (before < number &&
           !atomic.compare_exchange_weak(before, number, std::memory_order_release)) {
    }
  }
  void open(std::uint32_t number) {
    raise(go, number);
    raise(gate, number);
  }
};

// Operations of a stream. Writes `value` to `flag`; all work before it is visible to whoever sees
// the value.
CUstreamBatchMemOpParams write_operation(std::uint32_t& flag, std::uint32_t value);
// Waits until `flag` has reached `value`.
CUstreamBatchMemOpParams wait_operation(std::uint32_t& flag, std::uint32_t value);

}  // namespace pgk
