#include "core/processor_shares.h"

#include <cmath>
#include <string>
#include <utility>

#include "core/error.h"

namespace pgk {
namespace {

// Shares are decimal fractions: their sums are this near.
constexpr double kNear = 1e-6;

// "0.25"
std::string format_share(double share) {
  std::string text = std::to_string(share);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text;
}

}  // namespace

ProcessorShares::ProcessorShares(std::vector<unsigned> groups) : groups_(std::move(groups)) {}

double ProcessorShares::sum() const {
  double sum = 0;
  for (const auto& [id, share] : taken_) sum += share.share;
  return sum;
}

unsigned ProcessorShares::count(ProcessorSet set) const {
  unsigned count = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) count += (set >> i & 1) != 0 ? groups_[i] : 0;
  return count;
}

ProcessorSet ProcessorShares::free() const {
  ProcessorSet set = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) set |= ProcessorSet{1} << i;
  for (const auto& [id, share] : taken_) set &= ~share.set;
  return set;
}

ProcessorSet ProcessorShares::left() const {
  const ProcessorSet set = free();
  return count(set) == count(~ProcessorSet{0}) ? 0 : set;
}

// The free groups that come nearest to it from below. All are of one size but the last, so it is
// enough to try with and without that one.
ProcessorSet ProcessorShares::most_within(double processors) const {
  const ProcessorSet free = this->free();
  const auto fill = [&](ProcessorSet set) {
    for (std::size_t i = 0; i < groups_.size(); ++i) {
      const ProcessorSet group = ProcessorSet{1} << i;
      if ((free & group) != 0 && count(set | group) <= processors + kNear) set |= group;
    }
    return set;
  };
  const ProcessorSet without = fill(0);
  const ProcessorSet last = ProcessorSet{1} << (groups_.size() - 1);
  if ((free & last) == 0 || count(last) > processors + kNear) return without;
  const ProcessorSet with = fill(last);
  return count(with) > count(without) ? with : without;
}

ProcessorShares::Id ProcessorShares::take(double share) {
  const double before = sum();
  if (before + share > 1 + kNear) {
    throw Error(ErrorCode::admission, "a share of " + format_share(share) +
                                          " of the processors does not fit: partitions have " +
                                          format_share(before) + " of them");
  }
  ProcessorSet set = 0;
  if (!groups_.empty()) {
    const unsigned all = count(~ProcessorSet{0});
    set = before + share > 1 - kNear ? free() : most_within(share * all);
    if (set == 0) {
      throw Error(ErrorCode::admission,
                  "a share of " + format_share(share) + " of " + std::to_string(all) +
                      " processors is less than their smallest free group: groups have " +
                      std::to_string(groups_.front()) + " or more");
    }
  }
  taken_[next_] = {share, set};
  return next_++;
}

void ProcessorShares::give_back(Id id) {
  taken_.erase(id);
}

}  // namespace pgk
