#include "core/ledger.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "core/types.h"

namespace pgk {
namespace {

[[noreturn]] void refuse_base(std::size_t base, std::size_t uncommitted, std::size_t capacity) {
  throw Error(ErrorCode::admission, "a reservation of " + format_bytes(base) +
                                        " does not fit: " + format_bytes(uncommitted) +
                                        " of the device's " + format_bytes(capacity) +
                                        " are neither reserved nor in use");
}

void check_limits(std::size_t max, std::size_t base) {
  if (base > max) {
    throw Error(ErrorCode::invalid_value,
                "base " + format_bytes(base) + " is above max " + format_bytes(max));
  }
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
  account = changed;
}

Ledger::Id Ledger::open(std::size_t max, std::size_t base) {
  check_limits(max, base);
  if (base > uncommitted()) refuse_base(base, uncommitted(), capacity_);
  const Id id = next_++;
  replace(accounts_[id], Account{max, base, 0});
  return id;
}

void Ledger::close(Id id) {
  Account& account = find(id);
  if (account.resident != 0) {
    throw Error(ErrorCode::busy,
                "account " + std::to_string(id) + " still holds " + format_bytes(account.resident));
  }
  replace(account, Account{});
  accounts_.erase(id);
}

void Ledger::resize(Id id, std::size_t max, std::size_t base) {
  check_limits(max, base);
  Account& account = find(id);
  if (account.resident > max) {
    throw Error(ErrorCode::invalid_value, format_bytes(account.resident) +
                                              " are held, more than the new max of " +
                                              format_bytes(max));
  }
  const Account changed{max, base, account.resident};
  const std::size_t spare = uncommitted() + account.committed();
  if (changed.committed() > spare) refuse_base(base, spare, capacity_);
  replace(account, changed);
}

std::size_t Ledger::room(Id id) const {
  const Account& account = this->account(id);
  const std::size_t reserved = account.committed() - account.resident;
  return std::min(account.max - account.resident, reserved + uncommitted());
}

void Ledger::charge(Id id, std::size_t bytes) {
  if (bytes > room(id)) {
    throw Error(ErrorCode::out_of_memory, "a charge of " + format_bytes(bytes) +
                                              " exceeds the room of " + format_bytes(room(id)));
  }
  Account& account = find(id);
  replace(account, Account{account.max, account.base, account.resident + bytes});
}

void Ledger::refund(Id id, std::size_t bytes) {
  Account& account = find(id);
  if (bytes > account.resident) {
    throw Error(ErrorCode::invalid_value, "a refund of " + format_bytes(bytes) +
                                              " exceeds the held " +
                                              format_bytes(account.resident));
  }
  replace(account, Account{account.max, account.base, account.resident - bytes});
}

void Ledger::check_invariants() const {
  std::size_t committed = 0;
  std::size_t resident = 0;
  for (const auto& [id, account] : accounts_) {
    require(account.base <= account.max, "base <= max");
    require(account.resident <= account.max, "resident <= max");
    committed += account.committed();
    resident += account.resident;
  }
  require(committed == committed_, "committed is the sum of max(base, resident)");
  require(resident == resident_, "resident is the sum over the accounts");
  require(committed_ <= capacity_, "the sum of max(base, resident) <= capacity");
}

}  // namespace pgk
