// The words and units of the core. Everything else in csrc/ uses them in this sense.
//
//   context    an isolated user of the device: a budget, a tier, an arena and a stream
//   arena      a context's range of virtual addresses and the blocks in it
//   block      what one allocation got; its size is a multiple of a granule
//   granule    512 bytes, the unit of block sizes (torch rounds to the same)
//   page       the unit in which an arena receives physical memory, 2 to 32 MiB
//   handle     physical memory of a device that can be mapped at an address; one per page
//   lane       the free memory of an arena that may be reused in the order of one stream
//   fence      what keeps a freed block from reuse while other streams may still use it
//   used       bytes of live blocks
//   resident   (of a page) backed by device memory; the bytes of all such pages
//   evicted    (of a page) backed by host memory at the same address; the bytes of all such pages
//   backup     host memory that still holds what a page held when it came back to the device
//   base       the part of a budget that is reserved for the context
//   active     in use by open sessions, its own or those of declared consumers; otherwise idle
//   gate       a limit of open sessions, of a context or of several; a slot is one of so many
//   orphan     a destroyed context whose memory is still held by live blocks
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pgk {

inline constexpr std::size_t kGranule = 512;
inline constexpr std::size_t KiB = std::size_t{1} << 10;
inline constexpr std::size_t MiB = std::size_t{1} << 20;
inline constexpr std::size_t GiB = std::size_t{1} << 30;

// Higher value: more important.
enum class Tier : std::uint8_t { best_effort, burstable, guaranteed };
inline constexpr std::size_t kTiers = 3;

constexpr std::size_t round_up(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

constexpr const char* to_string(Tier tier) {
  switch (tier) {
    case Tier::guaranteed:
      return "guaranteed";
    case Tier::burstable:
      return "burstable";
    case Tier::best_effort:
      break;
  }
  return "best_effort";
}

// "512 B", "1.50 MiB", "4.00 GiB". Built without iostreams, whose locale machinery is not safe
// to use in an extension that was linked with a libstdc++ of its own.
std::string format_bytes(std::size_t bytes);

}  // namespace pgk
