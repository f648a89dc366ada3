// Who may hold how much of the device: pure accounting in bytes, no memory is touched here.
//
// Each account has a budget `max`, a reserved part `base`, what it holds of the device now,
// `resident`, and what it holds in host memory instead, `evicted`; the last two stay within the
// budget together. What an account commits is max(base, resident). A new base must fit beside
// everything that is committed.
//
// The unused part of a base is lent to accounts of lower tiers, and to no others: whoever lent it
// can get it back by evicting them. So for every tier, what its accounts commit and what those of
// higher tiers hold never exceeds the capacity; and as much host memory as is lent stays free for
// the way back.
//
// A partition is a part of the accounts with a limit of its own, within which all of that holds as
// well: their bases fit into it, what they hold of the device together never exceeds it, and what
// one of them does not use of its base is lent to the others.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>

#include "core/types.h"

namespace pgk {

class Ledger {
 public:
  using Id = std::uint64_t;
  using PartitionId = std::uint64_t;
  // The partition of all accounts, whose limit is the capacity.
  static constexpr PartitionId kDevice = 0;

  struct Account {
    std::size_t max = 0;
    std::size_t base = 0;
    Tier tier = Tier::burstable;
    PartitionId partition = kDevice;
    std::size_t page = 1;  // what it holds comes in pages of so many bytes
    std::size_t resident = 0;
    std::size_t evicted = 0;
    std::size_t peak_resident = 0;
    std::size_t committed() const { return base > resident ? base : resident; }
    std::size_t held() const { return resident + evicted; }
    // Pages that a base promises and that are not resident. By the books: pages that are on their
    // way back are.
    std::size_t unfilled(std::size_t promised) const {
      return promised / page - std::min(promised / page, resident / page);
    }
  };
  using PageCounts = std::map<std::size_t, std::size_t>;  // by the page's bytes

  // Without host memory nothing can be evicted, and so nothing is lent.
  explicit Ledger(std::size_t capacity, std::size_t host_limit = 0)
      : capacity_(capacity), host_limit_(host_limit), partitions_{{kDevice, {capacity, 0, {}}}} {}

  // How much of the capacity others than the accounts have taken.
  void set_outside(std::size_t bytes) { outside_ = bytes; }
  std::size_t outside() const { return outside_; }

  PartitionId open_partition(std::size_t limit);
  // It must have no accounts.
  void close_partition(PartitionId partition);

  // Throws ErrorCode::admission if `base` does not fit into what is not committed,
  // ErrorCode::invalid_value if `max` is above the partition's limit.
  Id open(std::size_t max, std::size_t base, Tier tier, PartitionId partition = kDevice,
          std::size_t page = 1);
  // The account must hold nothing.
  void close(Id id);
  // Throws ErrorCode::admission as `open` does, ErrorCode::invalid_value if the account already
  // holds more than the new `max`. On an error nothing has changed.
  void resize(Id id, std::size_t max, std::size_t base);
  // Moves the account to another partition. Throws as open() does, with what it commits as base.
  void assign(Id id, PartitionId partition);

  // Throw ErrorCode::out_of_memory if `bytes` exceeds room(id), or restorable(id).
  void charge(Id id, std::size_t bytes);
  void restore(Id id, std::size_t bytes);
  // Throw ErrorCode::invalid_value if the account does not hold that much there.
  void refund(Id id, std::size_t bytes);
  void evict(Id id, std::size_t bytes);
  void refund_evicted(Id id, std::size_t bytes);
  // Lets the account's peak start again from what is resident.
  void reset_peak(Id id);

  // Host memory of pages that are on their way, either way. Throws ErrorCode::invalid_value if that
  // exceeds what is evictable(true).
  void reserve_host(std::size_t bytes);
  void release_host(std::size_t bytes) { moving_ -= bytes; }

  // Bytes that charge() would accept now.
  std::size_t room(Id id) const;
  // Bytes that restore() would accept now.
  std::size_t restorable(Id id) const;
  // Bytes of the device that the account could still hold, whatever its own budget; and how many
  // others must give up before it could hold `bytes` more. The latter is above what is missing
  std::size_t free_for(Id id) const;
  // where others hold what is the account's. Of the bytes, `returning` come from host memory.
  std::size_t shortage(Id id, std::size_t bytes, std::size_t returning = 0) const;
  // The same within the account's partition: it takes others of the partition to mend that.
  std::size_t free_in_partition(Id id) const;
  std::size_t shortage_in_partition(Id id, std::size_t bytes) const;
  // The most that free_for(id) can become while others are evicted.
  std::size_t allowance(Id id) const;
  // By how much what is free for an account of the tier would grow if `holder` gave up all that its
  // base does not keep from it.
  static std::size_t spare(const Account& holder, Tier tier);
  // Bytes that are neither reserved nor held.
  std::size_t uncommitted(PartitionId partition = kDevice) const;
  // Bytes of bases that others hold.
  std::size_t lent(PartitionId partition = kDevice) const;
  // The pages of bases that are not resident, of accounts of `most` and lower tiers, without
  // `except`.
  PageCounts unfilled(Tier most = Tier::guaranteed, std::optional<Id> except = std::nullopt) const;
  // The sum of the budgets.
  std::size_t budgets(PartitionId partition) const { return find_partition(partition).budgets; }
  // Bytes that can be evicted: what is lent must still find its place, unless it is that.
  std::size_t evictable(bool of_loans) const;
  std::size_t limit(PartitionId partition) const;
  // Whether the account is one of the partition's; all are the device's.
  static bool is_in(const Account& account, PartitionId partition) {
    return partition == kDevice || account.partition == partition;
  }
  // What its accounts hold of the device.
  std::size_t resident(PartitionId partition) const { return find_partition(partition).resident(); }
  std::size_t evicted() const { return evicted_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t host_limit() const { return host_limit_; }
  std::size_t resident() const { return resident(kDevice); }
  const Account& account(Id id) const;

  // Throws ErrorCode::internal.
  void check_invariants() const;

 private:
  struct Sums {
    std::size_t committed = 0;
    std::size_t resident = 0;
  };
  struct Partition {
    std::size_t limit = 0;
    std::size_t accounts = 0;
    std::array<Sums, kTiers> tiers;
    std::size_t budgets = 0;
    std::size_t committed() const;
    std::size_t resident() const;
  };

  Account& find(Id id);
  const Partition& find_partition(PartitionId id) const;
  void count(const Account& account, std::size_t sign);
  void replace(Account& account, const Account& changed);
  void shift(Id id, std::size_t resident, std::size_t evicted);
  std::size_t taken_from(Id id, PartitionId partition) const;
  std::size_t missing_in(Id id, PartitionId partition, std::size_t bytes) const;
  void require_within(PartitionId partition, std::size_t max) const;
  void require_admission(PartitionId partition, const Account& account, std::size_t base,
                         std::size_t uncommitted) const;
  void check_partition(PartitionId id, const Partition& partition) const;

  std::size_t capacity_;
  std::size_t host_limit_;
  std::size_t outside_ = 0;
  std::size_t evicted_ = 0;
  std::size_t moving_ = 0;
  Id next_ = 1;
  std::unordered_map<Id, Account> accounts_;
  std::array<PageCounts, kTiers> unfilled_;
  PartitionId next_partition_ = kDevice + 1;
  std::map<PartitionId, Partition> partitions_;
};

}  // namespace pgk
