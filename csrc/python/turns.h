// Whose turn it is to enter a context: what Python adds to core/session_queue.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/session.h"
#include "python/event_fd.h"

namespace pgk::python {

// Null for None. Pybind11 converts None only at a second attempt, which costs more than an entry.
inline std::shared_ptr<SessionTicket> ticket_or_none(pybind11::handle ticket) {
  return ticket.is_none() ? nullptr : ticket.cast<std::shared_ptr<SessionTicket>>();
}
// Of the entries that the running task has open.
SessionTicket::List tickets_of_task();
// For an entry made here and now.
std::shared_ptr<SessionTicket> queue_up(Context& context);
// Blocks, for `timeout` seconds at most, but signal handlers may interrupt it.
void await_turn(SessionTicket& ticket, std::optional<double> timeout);

// Tells an event loop which tickets wait no longer: one file for all of them.
class TurnBell {
 public:
  int fileno() const { return fd_.fileno(); }
  void ring(std::uint64_t ticket) {
    {
      const std::lock_guard lock(mutex_);
      tickets_.push_back(ticket);
    }
    fd_.ring();
  }
  // Those since the last time.
  std::vector<std::uint64_t> take() {
    fd_.clear();
    const std::lock_guard lock(mutex_);
    return std::exchange(tickets_, {});
  }

 private:
  EventFd fd_;
  std::mutex mutex_;
  std::vector<std::uint64_t> tickets_;
};

}  // namespace pgk::python
