// How many sessions may be open at a time, and who is let in next.
//
// A gate has a limit of slots. An entry takes a slot of each gate of its context, all at once: who
// has to wait holds none meanwhile. Those who wait are ranked by tier, then by arrival. When slots
// come free, the first in rank for whom every gate has one is let in: who waits for one gate holds
// up nobody at another, and where two want the same slot the first in rank gets it.
//
// Who is in need not queue up again: what is entered within shares the slots of what is around it,
// gate by gate. A slot is given back when the last of those who share it has been left.
//
// One lock for all gates, because an entry may need several. Only contexts that have gates take it,
// and under it no other one is taken.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core/types.h"

namespace pgk {

class SessionTicket;

class SessionGate {
 public:
  // At least one slot. `owner` is what texts call it: "context 'a'", say.
  SessionGate(std::string owner, std::size_t limit);
  SessionGate(const SessionGate&) = delete;
  SessionGate& operator=(const SessionGate&) = delete;

  std::size_t limit() const { return limit_; }
  std::size_t open() const;
  std::size_t waiting() const;

 private:
  friend class SessionTicket;
  friend class Entrance;

  struct ByRank {
    bool operator()(const SessionTicket* one, const SessionTicket* other) const;
  };

  const std::string owner_;
  const std::size_t limit_;
  std::size_t open_ = 0;
  std::set<SessionTicket*, ByRank> waiting_;
};

// The gates of one context: its own, if it has a limit, and its partition's, if that has one.
class Entrance {
 public:
  // A limit of 0 is none.
  Entrance(const std::string& context, Tier tier, std::size_t limit);
  Entrance(const Entrance&) = delete;
  Entrance& operator=(const Entrance&) = delete;

  bool has_gates() const { return has_gates_.load(std::memory_order_relaxed); }
  // Null for none. Who waits by then still waits for the gates that there were.
  void set_partition_gate(std::shared_ptr<SessionGate> gate);
  std::size_t waiting() const { return waiting_.load(std::memory_order_relaxed); }
  // The context refuses everybody from now on: nobody waits here any more.
  void close();

 private:
  friend class SessionGate;
  friend class SessionTicket;

  const std::string context_;
  const Tier tier_;
  std::array<std::shared_ptr<SessionGate>, 2> gates_;  // null where there is none
  bool is_closed_ = false;
  std::atomic<bool> has_gates_;
  std::atomic<std::size_t> waiting_{0};
};

// An entry as far as gates are concerned, from queueing up until it is left.
class SessionTicket {
 public:
  using List = std::vector<std::shared_ptr<SessionTicket>>;

  // Takes slots, or a place among those who wait. `around` are the caller's entries.
  SessionTicket(std::shared_ptr<Entrance> entrance, const List& around);
  // Of what is started in sessions and is in their context by that: it has no slot, but while they
  // are open, what is entered within shares theirs.
  explicit SessionTicket(const List& around);
  ~SessionTicket() { end(); }
  SessionTicket(const SessionTicket&) = delete;
  SessionTicket& operator=(const SessionTicket&) = delete;

  // No two have the same.
  std::uint64_t number() const { return number_; }
  // Once it is not, it has its slots, or has ended, or the context is closed.
  bool is_waiting() const;
  // Blocks while it is waiting, at most so long.
  void wait_for(std::chrono::nanoseconds time);
  // Calls `call` once it is not waiting, with the lock: it must not come back here.
  void notify(std::function<void()> call);
  // Gives back what it has, from any thread. Once is enough. In a forked child it does nothing.
  void end();
  // Ends it and throws ErrorCode::session_timeout, or without `seconds`, how long it has waited,
  // ErrorCode::session: that the thread must not wait.
  [[noreturn]] void give_up(std::optional<double> seconds);

 private:
  friend class SessionGate;
  friend class Entrance;

  // With 0 holders it is still to be had, or given back.
  struct Slot {
    std::shared_ptr<SessionGate> gate;
    std::size_t holders = 0;
  };
  using Slots = std::vector<std::shared_ptr<Slot>>;

  // With the lock.
  static std::shared_ptr<Slot> find(const List& around, const SessionGate& gate);
  static SessionTicket* first_to_enter(const Slots& freed);
  bool can_enter() const;
  void take_slots();
  void stop_waiting();

  std::shared_ptr<Entrance> entrance_;
  bool holds_slots_;
  std::uint64_t process_;
  std::uint64_t number_ = 0;
  bool is_waiting_ = false;
  Slots slots_;
  std::condition_variable turn_;
  std::function<void()> call_;
};

// For the fork guard only.
void lock_session_queue();
void unlock_session_queue();

}  // namespace pgk
