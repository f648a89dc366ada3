// Who has to give way when the device is short: the order of eviction, as a pure function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/types.h"

namespace pgk {

// A context as the planner sees it.
struct Holder {
  std::uint64_t id = 0;
  Tier tier = Tier::burstable;
  bool orphan = false;
  bool active = false;  // has open sessions, or a declared consumer has
  bool mate = true;     // of the claimant's partition
  std::uint64_t last_use = 0;
  std::size_t spare = 0;  // bytes of live pages that its base does not keep from the claimant
  std::size_t page = 0;   // bytes; it gives up whole ones
};

struct Claim {
  Tier tier = Tier::burstable;
  bool of_base = false;  // nothing of it is beyond the claimant's base
  std::size_t bytes = 0;
  std::size_t bytes_of_mates = 0;  // what others of its partition must give up, part of `bytes`
};

struct Eviction {
  std::uint64_t id = 0;
  std::size_t bytes = 0;
  bool active = false;
};

// Orphans first; then idle contexts of the claim's tier and below, the lowest tier first, in each
// the least recently used first; and for a base, active contexts of lower tiers likewise. What only
// mates can give is taken first. Empty if all of that would not suffice.
std::vector<Eviction> plan_eviction(const Claim& claim, std::vector<Holder> holders);

// What plan_eviction() can reach at the most, of mates or of all, where only `limit` bytes may be
// evicted.
std::size_t evictable_bytes(const Claim& claim, const std::vector<Holder>& holders,
                            bool of_mates = false, std::size_t limit = SIZE_MAX);

}  // namespace pgk
