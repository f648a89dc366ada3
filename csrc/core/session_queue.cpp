#include "core/session_queue.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <mutex>
#include <utility>

#include "core/blocking.h"
#include "core/error.h"
#include "core/thread_entries.h"

namespace pgk {
namespace {

struct Queue {
  std::mutex mutex;
  std::uint64_t tickets = 0;
};

// Never destroyed: threads may end after static destructors have run.
Queue& queue() {
  static auto* instance = new Queue;
  return *instance;
}

using Lock = std::unique_lock<std::mutex>;

std::string text_of(double seconds) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%g s", seconds);
  return text.data();
}

}  // namespace

// Gates ------------------------------------------------------------------------------------------

SessionGate::SessionGate(std::string owner, std::size_t limit)
    : owner_(std::move(owner)), limit_(limit) {
  if (limit == 0) {
    throw Error(ErrorCode::invalid_value, owner_ + " must let at least one session in");
  }
}

std::size_t SessionGate::open() const {
  const Lock lock(queue().mutex);
  return open_;
}

std::size_t SessionGate::waiting() const {
  const Lock lock(queue().mutex);
  return waiting_.size();
}

bool SessionGate::ByRank::operator()(const SessionTicket* one, const SessionTicket* other) const {
  const Tier tier = one->entrance_->tier_;
  const Tier other_tier = other->entrance_->tier_;
  return tier != other_tier ? tier > other_tier : one->number_ < other->number_;
}

Entrance::Entrance(const std::string& context, Tier tier, std::size_t limit)
    : context_("context '" + context + "'"), tier_(tier), has_gates_(limit > 0) {
  if (limit > 0) gates_[0] = std::make_shared<SessionGate>(context_, limit);
}

void Entrance::set_partition_gate(std::shared_ptr<SessionGate> gate) {
  const Lock lock(queue().mutex);
  gates_[1] = std::move(gate);
  has_gates_ = gates_[0] != nullptr || gates_[1] != nullptr;
}

void Entrance::close() {
  const Lock lock(queue().mutex);
  is_closed_ = true;
  for (const auto& gate : gates_) {
    if (!gate) continue;
    const std::vector<SessionTicket*> waiting(gate->waiting_.begin(), gate->waiting_.end());
    for (SessionTicket* ticket : waiting) {
      if (ticket->entrance_.get() == this) ticket->stop_waiting();
    }
  }
}

// Tickets ----------------------------------------------------------------------------------------

SessionTicket::SessionTicket(std::shared_ptr<Entrance> entrance, const List& around)
    : entrance_(std::move(entrance)), holds_slots_(true), process_(detail::this_process()) {
  const Lock lock(queue().mutex);
  number_ = ++queue().tickets;
  if (entrance_->is_closed_) return;
  slots_.reserve(entrance_->gates_.size());
  for (const auto& gate : entrance_->gates_) {
    if (!gate) continue;
    slots_.push_back(find(around, *gate));
    if (slots_.back()) {
      ++slots_.back()->holders;
    } else {
      slots_.back() = std::make_shared<Slot>(Slot{gate});
    }
  }
  if (can_enter()) {
    take_slots();
    return;
  }
  is_waiting_ = true;
  ++entrance_->waiting_;
  for (const auto& slot : slots_) {
    if (slot->holders == 0) slot->gate->waiting_.insert(this);
  }
}

SessionTicket::SessionTicket(const List& around)
    : holds_slots_(false), process_(detail::this_process()) {
  const Lock lock(queue().mutex);
  number_ = ++queue().tickets;
  for (const auto& ticket : around) {
    std::copy_if(ticket->slots_.begin(), ticket->slots_.end(), std::back_inserter(slots_),
                 [](const auto& slot) { return slot->holders > 0; });
  }
}

bool SessionTicket::is_waiting() const {
  const Lock lock(queue().mutex);
  return is_waiting_;
}

void SessionTicket::wait_for(std::chrono::nanoseconds time) {
  const Blocking blocking;
  Lock lock(queue().mutex);
  turn_.wait_for(lock, time, [this] { return !is_waiting_; });
}

void SessionTicket::notify(std::function<void()> call) {
  const Lock lock(queue().mutex);
  if (is_waiting_) {
    call_ = std::move(call);
  } else {
    call();
  }
}

void SessionTicket::end() {
  if (process_ != detail::this_process()) return;
  const Lock lock(queue().mutex);
  if (is_waiting_) stop_waiting();
  const Slots slots = std::exchange(slots_, {});
  if (!holds_slots_) return;
  // All before anybody is let in: who needs several must not be passed between two.
  for (const auto& slot : slots) {
    if (slot->holders > 0 && --slot->holders == 0) --slot->gate->open_;
  }
  while (SessionTicket* next = first_to_enter(slots)) {
    next->stop_waiting();
    next->take_slots();
  }
}

void SessionTicket::give_up(std::optional<double> seconds) {
  std::string gates;
  {
    const Lock lock(queue().mutex);
    for (const auto& slot : slots_) {
      if (slot->holders > 0) continue;
      const SessionGate& gate = *slot->gate;
      gates += (gates.empty() ? " (" : "; ") + gate.owner_ + ": " + std::to_string(gate.open_) +
               " of " + std::to_string(gate.limit_) + " sessions open, " +
               std::to_string(gate.waiting_.size() - (is_waiting_ ? 1 : 0)) + " others waiting";
    }
    if (!gates.empty()) gates += ")";
  }
  end();
  if (seconds) {
    throw Error(ErrorCode::session_timeout, entrance_->context_ +
                                                " was not entered: it was not its turn within " +
                                                text_of(*seconds) + gates);
  }
  throw Error(ErrorCode::session, entrance_->context_ +
                                      " cannot be entered by 'with' now: waiting for its turn "
                                      "would block the running event loop" +
                                      gates + "; use 'async with'");
}

std::shared_ptr<SessionTicket::Slot> SessionTicket::find(const List& around,
                                                         const SessionGate& gate) {
  for (const auto& ticket : around) {
    for (const auto& slot : ticket->slots_) {
      if (slot->gate.get() == &gate && slot->holders > 0) return slot;
    }
  }
  return nullptr;
}

SessionTicket* SessionTicket::first_to_enter(const Slots& freed) {
  SessionTicket* first = nullptr;
  for (const auto& slot : freed) {
    const SessionGate& gate = *slot->gate;
    if (gate.open_ == gate.limit_) continue;
    for (SessionTicket* ticket : gate.waiting_) {
      if (first != nullptr && !SessionGate::ByRank()(ticket, first)) break;
      if (!ticket->can_enter()) continue;
      first = ticket;
      break;
    }
  }
  return first;
}

bool SessionTicket::can_enter() const {
  return std::all_of(slots_.begin(), slots_.end(), [](const auto& slot) {
    return slot->holders > 0 || slot->gate->open_ < slot->gate->limit_;
  });
}

void SessionTicket::take_slots() {
  for (const auto& slot : slots_) {
    if (slot->holders > 0) continue;
    slot->holders = 1;
    ++slot->gate->open_;
  }
}

void SessionTicket::stop_waiting() {
  is_waiting_ = false;
  --entrance_->waiting_;
  for (const auto& slot : slots_) slot->gate->waiting_.erase(this);
  turn_.notify_all();
  if (const auto call = std::exchange(call_, nullptr)) call();
}

// Fork -------------------------------------------------------------------------------------------

void lock_session_queue() {
  queue().mutex.lock();
}

void unlock_session_queue() {
  queue().mutex.unlock();
}

}  // namespace pgk
