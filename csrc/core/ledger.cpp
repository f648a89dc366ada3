#include "core/ledger.h"

#include <algorithm>
#include <string>

#include "core/admission.h"
#include "core/error.h"

namespace pgk {
namespace {

// What reserves nothing is always admitted: it waits for room only when it allocates.
void require_admission(const Ledger::Account& account, std::size_t free, std::size_t capacity) {
  if (account.base == 0) return;
  const QosTaskMeta task{
      .tier = account.tier, .memory_request = account.base, .memory_limit = account.max};
  const Evaluation evaluation = evaluate(task, {.total_memory = capacity, .free_memory = free});
  if (!evaluation.admitted()) throw Error(ErrorCode::admission, evaluation.reason);
}

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

void Ledger::replace(Account& account, const Account& changed) {
  committed_ = committed_ - account.committed() + changed.committed();
  resident_ = resident_ - account.resident + changed.resident;
  evicted_ = evicted_ - account.evicted + changed.evicted;
  account = changed;
}

Ledger::Id Ledger::open(std::size_t max, std::size_t base, Tier tier) {
  check_limits(max, base);
  const Account account{max, base, tier, 0, 0};
  require_admission(account, uncommitted(), capacity_);
  const Id id = next_++;
  replace(accounts_[id], account);
  return id;
}

void Ledger::close(Id id) {
  Account& account = find(id);
  if (account.held() != 0) {
    throw Error(ErrorCode::busy,
                "account " + std::to_string(id) + " still holds " + format_bytes(account.held()));
  }
  replace(account, Account{});
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
  const std::size_t others = committed_ - account.committed();
  const std::size_t spare = less(less(capacity_, outside_), others);
  // What is lent out may be less than what is given up here, and still more than there is.
  if (changed.committed() > account.committed()) require_admission(changed, spare, capacity_);
  replace(account, changed);
}

std::size_t Ledger::taken_from(Id id) const {
  const Account& account = this->account(id);
  std::size_t taken = outside_ + account.resident;
  for (const auto& [other, held] : accounts_) {
    if (other != id) taken += guarded(held, account.tier);
  }
  return taken;
}

std::size_t Ledger::allowance(Id id) const {
  const Account& account = this->account(id);
  return account.committed() - account.resident + uncommitted() + evictable(false);
}

std::size_t Ledger::free_for(Id id) const {
  return std::min(less(capacity_, taken_from(id)), allowance(id));
}

std::size_t Ledger::shortage(Id id, std::size_t bytes) const {
  return std::max(less(bytes + taken_from(id), capacity_), less(bytes, allowance(id)));
}

std::size_t Ledger::uncommitted() const {
  return less(less(capacity_, outside_), committed_);
}

std::size_t Ledger::lent() const {
  return less(committed_, less(capacity_, outside_));
}

std::size_t Ledger::evictable(bool of_loans) const {
  return less(host_limit_, evicted_ + moving_ + (of_loans ? 0 : lent()));
}

std::size_t Ledger::spare(Id holder, Id id) const {
  const Account& held = account(holder);
  const Account without{held.max, held.base, held.tier, 0, 0};
  const Tier tier = account(id).tier;
  return guarded(held, tier) - guarded(without, tier);
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
  replace(account, changed);
}

void Ledger::reserve_host(std::size_t bytes) {
  if (bytes > evictable(true)) refuse_refund(bytes, evictable(true), "host memory");
  moving_ += bytes;
}

void Ledger::check_invariants() const {
  std::size_t committed = 0;
  std::size_t resident = 0;
  std::size_t evicted = 0;
  std::map<Tier, std::size_t> committed_by_tier;
  std::map<Tier, std::size_t> resident_by_tier;
  for (const auto& [id, account] : accounts_) {
    require(account.base <= account.max, "base <= max");
    require(account.held() <= account.max, "resident and evicted <= max");
    committed += account.committed();
    resident += account.resident;
    evicted += account.evicted;
    committed_by_tier[account.tier] += account.committed();
    resident_by_tier[account.tier] += account.resident;
  }
  require(committed == committed_, "committed is the sum of max(base, resident)");
  require(resident == resident_, "resident is the sum over the accounts");
  require(evicted == evicted_ && evicted_ <= host_limit_, "evicted is the sum, within its limit");
  require(resident_ <= capacity_, "the sum of resident <= capacity");
  require(outside_ > 0 || evicted_ + lent() <= host_limit_, "what is lent can be evicted");
  for (const auto& [tier, bytes] : committed_by_tier) {
    std::size_t protected_bytes = bytes;
    for (const auto& [other, held] : resident_by_tier) {
      if (other > tier) protected_bytes += held;
    }
    require(protected_bytes <= capacity_,
            "what a tier commits and higher ones hold <= capacity: bases can be claimed");
  }
}

}  // namespace pgk
