#include "core/eviction.h"

#include <algorithm>
#include <tuple>

namespace pgk {
namespace {

bool may_be_evicted(const Claim& claim, const Holder& holder) {
  if (holder.spare == 0) return false;
  if (holder.active) return claim.of_base && holder.tier < claim.tier;
  return holder.orphan || holder.tier <= claim.tier;
}

}  // namespace

std::size_t evictable_bytes(const Claim& claim, const std::vector<Holder>& holders, bool of_mates,
                            std::size_t limit) {
  std::size_t bytes = 0;
  for (const Holder& holder : holders) {
    if (!may_be_evicted(claim, holder) || (of_mates && !holder.mate)) continue;
    bytes += std::min(holder.spare, (limit - bytes) / holder.page * holder.page);
  }
  return bytes;
}

std::vector<Eviction> plan_eviction(const Claim& claim, std::vector<Holder> holders) {
  if (evictable_bytes(claim, holders) < claim.bytes ||
      evictable_bytes(claim, holders, /*of_mates=*/true) < claim.bytes_of_mates) {
    return {};
  }
  std::erase_if(holders, [&](const Holder& holder) { return !may_be_evicted(claim, holder); });
  std::stable_sort(holders.begin(), holders.end(), [](const Holder& a, const Holder& b) {
    const auto rank = [](const Holder& holder) {
      return std::tuple(holder.active, !holder.orphan, holder.tier, holder.last_use);
    };
    return rank(a) < rank(b);
  });
  std::vector<std::size_t> given(holders.size());
  std::size_t given_by_all = 0;
  const auto take = [&](std::size_t wanted, bool of_mates) {
    for (std::size_t i = 0; i < holders.size() && wanted > 0; ++i) {
      const Holder& holder = holders[i];
      if (of_mates && !holder.mate) continue;
      const std::size_t bytes = std::min(holder.spare - given[i], round_up(wanted, holder.page));
      given[i] += bytes;
      given_by_all += bytes;
      wanted -= std::min(wanted, bytes);
    }
  };
  take(claim.bytes_of_mates, /*of_mates=*/true);
  take(claim.bytes - std::min(claim.bytes, given_by_all), /*of_mates=*/false);
  std::vector<Eviction> plan;
  for (std::size_t i = 0; i < holders.size(); ++i) {
    if (given[i] > 0) plan.push_back({holders[i].id, given[i], holders[i].active});
  }
  return plan;
}

}  // namespace pgk
