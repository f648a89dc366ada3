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

  static Context* owner_of(const void* pointer) {
    const Address unit = reinterpret_cast<Address>(pointer) / kUnit;
    return unit < kUnits ? table_[unit].load(std::memory_order_relaxed) : nullptr;
  }
  // False if part of the range lies outside of the 47 bits of user addresses.
  static bool set(Address address, std::size_t bytes, Context* owner) {
    if ((address + bytes - 1) / kUnit >= kUnits) return false;
    for (std::size_t unit = address / kUnit; unit < (address + bytes) / kUnit; ++unit) {
      table_[unit].store(owner, std::memory_order_relaxed);
    }
    return true;
  }

 private:
  static constexpr std::size_t kUnits = (std::size_t{1} << 47) / kUnit;
  // A pointer reaches a thread after the block was handed out, with whatever orders that
  // hand-over; it orders the entry too.
  static inline std::array<std::atomic<Context*>, kUnits> table_{};
};

}  // namespace pgk
