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

std::size_t evictable_bytes(const Claim& claim, const std::vector<Holder>& holders,
                            std::size_t limit) {
  std::size_t bytes = 0;
  for (const Holder& holder : holders) {
    if (!may_be_evicted(claim, holder)) continue;
    bytes += std::min(holder.spare, (limit - bytes) / holder.page * holder.page);
  }
  return bytes;
}

std::vector<Eviction> plan_eviction(const Claim& claim, std::vector<Holder> holders) {
  if (evictable_bytes(claim, holders) < claim.bytes) return {};
  std::erase_if(holders, [&](const Holder& holder) { return !may_be_evicted(claim, holder); });
  std::stable_sort(holders.begin(), holders.end(), [](const Holder& a, const Holder& b) {
    const auto rank = [](const Holder& holder) {
      return std::tuple(holder.active, !holder.orphan, holder.tier, holder.last_use);
    };
    return rank(a) < rank(b);
  });
  std::vector<Eviction> plan;
  std::size_t missing = claim.bytes;
  for (const Holder& holder : holders) {
    if (missing == 0) break;
    const std::size_t bytes = std::min(holder.spare, round_up(missing, holder.page));
    plan.push_back({holder.id, bytes, holder.active});
    missing -= std::min(missing, bytes);
  }
  return plan;
}

}  // namespace pgk
