#include "core/ledger.h"

#include <algorithm>
#include <string>

#include "core/admission.h"
#include "core/error.h"

namespace pgk {
namespace {

void check_limits(std::size_t max, std::size_t base) {
  if (base > max) {
    throw Error(ErrorCode::invalid_value,
                "base " + format_bytes(base) + " is above max " + format_bytes(max));
  }
}

// What of `account` an account of another one's tier `seen_from` cannot have.
std::size_t guarded(const Ledger::Account& account, Tier seen_from) {
  return account.tier > seen_from ? account.resident : account.committed();
}

std::size_t less(std::size_t a, std::size_t b) {
  return a - std::min(a, b);
}

[[noreturn]] void refuse_refund(std::size_t bytes, std::size_t held, const char* what) {
  throw Error(ErrorCode::invalid_value, std::string(what) + " of " + format_bytes(bytes) +
                                            " exceeds the held " + format_bytes(held));
}

}  // namespace

// Partitions -------------------------------------------------------------------------------------

std::size_t Ledger::Partition::committed() const {
  std::size_t bytes = 0;
  for (const Sums& tier : tiers) bytes += tier.committed;
  return bytes;
}

std::size_t Ledger::Partition::resident() const {
  std::size_t bytes = 0;
  for (const Sums& tier : tiers) bytes += tier.resident;
  return bytes;
}

const Ledger::Partition& Ledger::find_partition(PartitionId id) const {
  const auto it = partitions_.find(id);
  if (it == partitions_.end()) {
    throw Error(ErrorCode::invalid_value, "no partition " + std::to_string(id));
  }
  return it->second;
}

Ledger::PartitionId Ledger::open_partition(std::size_t limit) {
  const PartitionId id = next_partition_++;
  partitions_[id].limit = limit;
  return id;
}

void Ledger::close_partition(PartitionId id) {
  if (id == kDevice || find_partition(id).accounts != 0) {
    throw Error(ErrorCode::busy, "partition " + std::to_string(id) + " has accounts");
  }
  partitions_.erase(id);
}

std::size_t Ledger::limit(PartitionId id) const {
  const std::size_t limit = find_partition(id).limit;
  return id == kDevice ? less(limit, outside_) : limit;
}

std::size_t Ledger::uncommitted(PartitionId id) const {
  return less(limit(id), find_partition(id).committed());
}

std::size_t Ledger::lent(PartitionId id) const {
  return less(find_partition(id).committed(), limit(id));
}

void Ledger::require_within(PartitionId id, std::size_t max) const {
  if (id != kDevice && max > limit(id)) {
    throw Error(ErrorCode::invalid_value, "max " + format_bytes(max) + " is above the " +
                                              format_bytes(limit(id)) + " of its partition");
  }
}

// What reserves nothing is always admitted: it waits for room only when it allocates.
void Ledger::require_admission(PartitionId id, const Account& account, std::size_t base,
                               std::size_t uncommitted) const {
  if (base == 0) return;
  const QosTaskMeta task{.tier = account.tier, .memory_request = base, .memory_limit = account.max};
  const Evaluation evaluation =
      evaluate(task, {.total_memory = find_partition(id).limit,
                      .free_memory = uncommitted,
                      .owner = id == kDevice ? "the device" : "the partition"});
  if (!evaluation.admitted()) throw Error(ErrorCode::admission, evaluation.reason);
}

// Accounts ---------------------------------------------------------------------------------------

Ledger::Account& Ledger::find(Id id) {
  const auto it = accounts_.find(id);
  if (it == accounts_.end()) {
    throw Error(ErrorCode::invalid_value, "no account " + std::to_string(id));
  }
  return it->second;
}

const Ledger::Account& Ledger::account(Id id) const {
  return const_cast<Ledger*>(this)->find(id);
}

// Adds what an account is to the sums, `sign` times, modulo the size of a word.
void Ledger::count(const Account& account, std::size_t sign) {
  const auto tier = static_cast<std::size_t>(account.tier);
  const auto count_in = [&](Partition& partition) {
    partition.tiers[tier].committed += sign * account.committed();
    partition.tiers[tier].resident += sign * account.resident;
    partition.budgets += sign * account.max;
  };
  count_in(partitions_.at(kDevice));
  if (account.partition != kDevice) count_in(partitions_.at(account.partition));
  unfilled_[tier][account.page] += sign * account.unfilled(account.base);
  evicted_ += sign * account.evicted;
}

void Ledger::replace(Account& account, const Account& changed) {
  count(account, std::size_t{0} - 1);
  count(changed, 1);
  account = changed;
}

Ledger::Id Ledger::open(std::size_t max, std::size_t base, Tier tier, PartitionId partition,
                        std::size_t page) {
  check_limits(max, base);
  if (page == 0) throw Error(ErrorCode::invalid_value, "a page has at least one byte");
  require_within(partition, max);
  const Account account{max, base, tier, partition, page, 0, 0};
  for (const PartitionId id : {kDevice, partition}) {
    require_admission(id, account, base, uncommitted(id));
  }
  const Id id = next_++;
  accounts_[id] = account;
  count(account, 1);
  ++partitions_[partition].accounts;
  return id;
}

void Ledger::close(Id id) {
  Account& account = find(id);
  if (account.held() != 0) {
    throw Error(ErrorCode::busy,
                "account " + std::to_string(id) + " still holds " + format_bytes(account.held()));
  }
  --partitions_[account.partition].accounts;
  count(account, std::size_t{0} - 1);
  accounts_.erase(id);
}

void Ledger::resize(Id id, std::size_t max, std::size_t base) {
  check_limits(max, base);
  Account& account = find(id);
  if (account.held() > max) {
    throw Error(
        ErrorCode::invalid_value,
        format_bytes(account.held()) + " are held, more than the new max of " + format_bytes(max));
  }
  Account changed = account;
  changed.max = max;
  changed.base = base;
  require_within(account.partition, max);
  for (const PartitionId partition : {kDevice, account.partition}) {
    // What is lent out may be less than what is given up here, and still more than there is.
    if (changed.committed() <= account.committed()) break;
    const std::size_t others = find_partition(partition).committed() - account.committed();
    const std::size_t spare = less(limit(partition), others);
    if (changed.committed() > spare) require_admission(partition, changed, base, spare);
  }
  replace(account, changed);
}

void Ledger::assign(Id id, PartitionId partition) {
  Account& account = find(id);
  if (account.partition == partition) return;
  require_within(partition, account.max);
  if (partition != kDevice) {
    require_admission(partition, account, account.committed(), uncommitted(partition));
  }
  Account changed = account;
  changed.partition = partition;
  ++partitions_.at(partition).accounts;
  --partitions_.at(account.partition).accounts;
  replace(account, changed);
}

// Room -------------------------------------------------------------------------------------------

std::size_t Ledger::taken_from(Id id, PartitionId partition) const {
  const Account& account = this->account(id);
  const auto own = static_cast<std::size_t>(account.tier);
  std::size_t taken = account.resident - guarded(account, account.tier);
  const auto& tiers = find_partition(partition).tiers;
  for (std::size_t tier = 0; tier < kTiers; ++tier) {
    taken += tier > own ? tiers[tier].resident : tiers[tier].committed;
  }
  return taken;
}

// What the account holds beyond its base is a loan wherever it exceeds what is uncommitted, and all
// loans together need their place in host memory.
std::size_t Ledger::allowance(Id id) const {
  const Account& account = this->account(id);
  const std::size_t own = account.committed() - account.resident;
  const std::size_t places = evictable(false);
  const std::size_t on_device = uncommitted();
  if (account.partition == kDevice) return own + on_device + places;
  const std::size_t within = uncommitted(account.partition);
  const std::size_t first = std::min(on_device, within);
  const std::size_t then = std::max(on_device, within) - first;
  return own + first + (places <= then ? places : then + (places - then) / 2);
}

std::size_t Ledger::free_in_partition(Id id) const {
  const PartitionId partition = account(id).partition;
  return less(limit(partition), taken_from(id, partition));
}

std::size_t Ledger::free_for(Id id) const {
  return std::min(
      {less(limit(kDevice), taken_from(id, kDevice)), free_in_partition(id), allowance(id)});
}

std::size_t Ledger::missing_in(Id id, PartitionId partition, std::size_t bytes) const {
  return less(bytes + taken_from(id, partition), limit(partition));
}

std::size_t Ledger::shortage(Id id, std::size_t bytes, std::size_t returning) const {
  return std::max(missing_in(id, kDevice, bytes), less(bytes, allowance(id) + returning));
}

std::size_t Ledger::shortage_in_partition(Id id, std::size_t bytes) const {
  return missing_in(id, account(id).partition, bytes);
}

std::size_t Ledger::evictable(bool of_loans) const {
  std::size_t taken = evicted_ + moving_;
  for (const auto& [id, partition] : partitions_) taken += of_loans ? 0 : lent(id);
  return less(host_limit_, taken);
}

std::size_t Ledger::spare(const Account& holder, Tier tier) {
  Account without = holder;
  without.resident = without.evicted = 0;
  return guarded(holder, tier) - guarded(without, tier);
}

std::size_t Ledger::room(Id id) const {
  const Account& account = this->account(id);
  return std::min(account.max - account.held(), free_for(id));
}

std::size_t Ledger::restorable(Id id) const {
  return std::min(account(id).evicted, free_for(id));
}

void Ledger::charge(Id id, std::size_t bytes) {
  if (bytes > room(id)) {
    throw Error(ErrorCode::out_of_memory, "a charge of " + format_bytes(bytes) +
                                              " exceeds the room of " + format_bytes(room(id)));
  }
  shift(id, bytes, 0);
}

void Ledger::restore(Id id, std::size_t bytes) {
  if (bytes > restorable(id)) {
    throw Error(ErrorCode::out_of_memory, "a restore of " + format_bytes(bytes) +
                                              " exceeds the room of " +
                                              format_bytes(restorable(id)));
  }
  shift(id, bytes, 0 - bytes);
}

void Ledger::refund(Id id, std::size_t bytes) {
  if (bytes > find(id).resident) refuse_refund(bytes, find(id).resident, "a refund");
  shift(id, 0 - bytes, 0);
}

void Ledger::evict(Id id, std::size_t bytes) {
  if (bytes > find(id).resident) refuse_refund(bytes, find(id).resident, "an eviction");
  shift(id, 0 - bytes, bytes);
}

void Ledger::refund_evicted(Id id, std::size_t bytes) {
  if (bytes > find(id).evicted) refuse_refund(bytes, find(id).evicted, "a refund");
  shift(id, 0, 0 - bytes);
}

// By amounts that may be negative, modulo the size of a word.
void Ledger::shift(Id id, std::size_t resident, std::size_t evicted) {
  Account& account = find(id);
  Account changed = account;
  changed.resident += resident;
  changed.evicted += evicted;
  changed.peak_resident = std::max(changed.peak_resident, changed.resident);
  replace(account, changed);
}

void Ledger::reset_peak(Id id) {
  Account& account = find(id);
  account.peak_resident = account.resident;
}

void Ledger::reserve_host(std::size_t bytes) {
  if (bytes > evictable(true)) refuse_refund(bytes, evictable(true), "host memory");
  moving_ += bytes;
}

Ledger::PageCounts Ledger::unfilled(Tier most, std::optional<Id> except) const {
  PageCounts counts;
  for (std::size_t tier = 0; tier <= static_cast<std::size_t>(most); ++tier) {
    for (const auto& [page, count] : unfilled_[tier]) counts[page] += count;
  }
  if (except && account(*except).tier <= most) {
    counts[account(*except).page] -= account(*except).unfilled(account(*except).base);
  }
  return counts;
}

void Ledger::check_partition(PartitionId id, const Partition& partition) const {
  std::size_t accounts = 0;
  std::size_t committed = 0;
  std::size_t resident = 0;
  std::size_t budgets = 0;
  std::map<Tier, std::size_t> committed_by_tier;
  std::map<Tier, std::size_t> resident_by_tier;
  for (const auto& [other, account] : accounts_) {
    accounts += account.partition == id ? 1 : 0;
    if (id != kDevice && account.partition != id) continue;
    committed += account.committed();
    resident += account.resident;
    budgets += account.max;
    committed_by_tier[account.tier] += account.committed();
    resident_by_tier[account.tier] += account.resident;
  }
  require(accounts == partition.accounts, "accounts of a partition are counted");
  require(committed == partition.committed(), "committed is the sum of max(base, resident)");
  require(resident == partition.resident(), "resident is the sum over the accounts");
  require(budgets == partition.budgets, "budgets is the sum over the accounts");
  require(resident <= partition.limit, "the sum of resident is within the limit");
  for (const auto& [tier, bytes] : committed_by_tier) {
    std::size_t protected_bytes = bytes;
    for (const auto& [other, held] : resident_by_tier) {
      if (other > tier) protected_bytes += held;
    }
    const Sums& sums = partition.tiers[static_cast<std::size_t>(tier)];
    require(sums.committed == bytes && sums.resident == resident_by_tier[tier],
            "the sums of a tier are those over its accounts");
    require(protected_bytes <= partition.limit,
            "what a tier commits and higher ones hold is within the limit: bases can be claimed");
  }
}

void Ledger::check_invariants() const {
  std::size_t evicted = 0;
  std::array<PageCounts, kTiers> unfilled;
  for (const auto& [id, account] : accounts_) {
    require(account.base <= account.max, "base <= max");
    require(account.held() <= account.max, "resident and evicted <= max");
    require(account.partition == kDevice || account.max <= limit(account.partition),
            "max is within the partition's limit");
    evicted += account.evicted;
    unfilled[static_cast<std::size_t>(account.tier)][account.page] +=
        account.unfilled(account.base);
  }
  for (std::size_t tier = 0; tier < kTiers; ++tier) {
    PageCounts counted = unfilled_[tier];
    for (const auto& [page, count] : unfilled[tier]) {
      require(count == counted[page], "unfilled pages of bases are counted");
      counted.erase(page);
    }
    for (const auto& [page, count] : counted) require(count == 0, "and no others");
  }
  std::size_t lent = 0;
  for (const auto& [id, partition] : partitions_) {
    check_partition(id, partition);
    lent += this->lent(id);
  }
  require(evicted == evicted_ && evicted_ <= host_limit_, "evicted is the sum, within its limit");
  require(outside_ > 0 || evicted_ + lent <= host_limit_, "what is lent can be evicted");
}

}  // namespace pgk
