// From an address to the context whose range holds it: one array indexed by gibibyte. Ranges are
// aligned to a gibibyte, so a look-up is a shift and a load; no lock, no search.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>

#include "core/types.h"
#include "device/device.h"

namespace pgk {

class Context;

class AddressTable {
 public:
  static constexpr std::size_t kUnit = GiB;

  // The context whose block starts or lies there; null for its segments, which others divide.
  static Context* owner_of(const void* pointer) {
    const std::uintptr_t entry = entry_of(pointer);
    return (entry & kSegments) == 0 ? reinterpret_cast<Context*>(entry) : nullptr;
  }
  static Context* segment_owner_of(const void* pointer) {
    const std::uintptr_t entry = entry_of(pointer);
    return (entry & kSegments) != 0 ? reinterpret_cast<Context*>(entry & ~kSegments) : nullptr;
  }
  // `segments` is where the range's segments begin. Null for nobody. False if part of the range
  // lies outside of the 47 bits of user addresses.
  static bool set(Address address, std::size_t bytes, Address segments, Context* owner) {
    if ((address + bytes - 1) / kUnit >= kUnits) return false;
    const auto entry = reinterpret_cast<std::uintptr_t>(owner);
    for (std::size_t unit = address / kUnit; unit < (address + bytes) / kUnit; ++unit) {
      const bool tagged = owner != nullptr && unit >= segments / kUnit;
      table_[unit].store(tagged ? entry | kSegments : entry, std::memory_order_relaxed);
    }
    return true;
  }

 private:
  static constexpr std::size_t kUnits = (std::size_t{1} << 47) / kUnit;
  static constexpr std::uintptr_t kSegments = 1;

  static std::uintptr_t entry_of(const void* pointer) {
    const Address unit = reinterpret_cast<Address>(pointer) / kUnit;
    return unit < kUnits ? table_[unit].load(std::memory_order_relaxed) : 0;
  }

  // A pointer reaches a thread after the block was handed out, with whatever orders that
  // hand-over; it orders the entry too.
  static inline std::array<std::atomic<std::uintptr_t>, kUnits> table_{};
};

}  // namespace pgk
