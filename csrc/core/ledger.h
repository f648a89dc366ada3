// Who may hold how much of the device: pure accounting in bytes, no memory is touched here.
//
// Each account has a budget `max`, a reserved part `base` and what it holds now, `resident`.
// What an account commits is max(base, resident); the sum over all never exceeds the capacity.
// So an account below its base can always be charged up to it, and nobody can be admitted or
// grow at the cost of a reservation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

namespace pgk {

class Ledger {
 public:
  using Id = std::uint64_t;
  struct Account {
    std::size_t max = 0;
    std::size_t base = 0;
    std::size_t resident = 0;
    std::size_t committed() const { return base > resident ? base : resident; }
  };

  explicit Ledger(std::size_t capacity) : capacity_(capacity) {}

  // Throws ErrorCode::admission if `base` does not fit into what is not committed.
  Id open(std::size_t max, std::size_t base);
  // The account must hold nothing.
  void close(Id id);
  // Throws ErrorCode::admission as `open` does, ErrorCode::invalid_value if the account already
  // holds more than the new `max`. On an error nothing has changed.
  void resize(Id id, std::size_t max, std::size_t base);

  // Throws ErrorCode::out_of_memory if `bytes` exceeds room(id).
  void charge(Id id, std::size_t bytes);
  void refund(Id id, std::size_t bytes);

  // Bytes that charge() would accept now.
  std::size_t room(Id id) const;
  // Bytes that are neither reserved nor held.
  std::size_t uncommitted() const { return capacity_ - committed_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t resident() const { return resident_; }
  const Account& account(Id id) const;

  // Throws ErrorCode::internal.
  void check_invariants() const;

 private:
  Account& find(Id id);
  void replace(Account& account, const Account& changed);

  std::size_t capacity_;
  std::size_t committed_ = 0;
  std::size_t resident_ = 0;
  Id next_ = 1;
  std::map<Id, Account> accounts_;
};

}  // namespace pgk
