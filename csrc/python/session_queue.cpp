#include "core/session_queue.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "python/bindings.h"
#include "python/turns.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

// How long a thread waits before it looks for signals, in seconds.
constexpr double kSlice = 0.05;

SessionTicket::List tickets_here() {
  SessionTicket::List tickets = tickets_of_task();
  SessionTicket::List others = tickets_of_thread();
  std::move(others.begin(), others.end(), std::back_inserter(tickets));
  return tickets;
}

}  // namespace

std::shared_ptr<SessionTicket> queue_up(Context& context) {
  return context.has_gates() ? context.queue_up(tickets_here()) : nullptr;
}

void await_turn(SessionTicket& ticket, std::optional<double> timeout) {
  using Seconds = std::chrono::duration<double>;
  const auto begin = std::chrono::steady_clock::now();
  while (ticket.is_waiting()) {
    double time = kSlice;
    if (timeout) {
      const Seconds waited = std::chrono::steady_clock::now() - begin;
      if (waited.count() >= *timeout) ticket.give_up(timeout);
      time = std::min(time, *timeout - waited.count());
    }
    ticket.wait_for(std::chrono::duration_cast<std::chrono::nanoseconds>(Seconds(time)));
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

void bind_session_queue(py::module_& module) {
  py::class_<SessionGate, std::shared_ptr<SessionGate>>(module, "SessionGate")
      .def(py::init<std::string, std::size_t>(), py::arg("owner"), py::arg("limit"))
      .def_property_readonly("limit", &SessionGate::limit)
      .def_property_readonly("open", &SessionGate::open)
      .def_property_readonly("waiting", &SessionGate::waiting);

  py::class_<TurnBell, std::shared_ptr<TurnBell>>(module, "TurnBell")
      .def(py::init<>())
      .def("fileno", &TurnBell::fileno)
      .def("take", &TurnBell::take);

  py::class_<SessionTicket, std::shared_ptr<SessionTicket>>(module, "SessionTicket")
      .def_static("inherited",
                  []() -> std::shared_ptr<SessionTicket> {
                    const SessionTicket::List around = tickets_here();
                    return around.empty() ? nullptr : std::make_shared<SessionTicket>(around);
                  })
      .def_static(
          "inherited",
          [](const SessionTicket::List& around) { return std::make_shared<SessionTicket>(around); },
          py::arg("around"))
      .def_property_readonly("number", &SessionTicket::number)
      .def_property_readonly("is_waiting", &SessionTicket::is_waiting)
      .def(
          "notify",
          [](SessionTicket& self, std::shared_ptr<TurnBell> bell) {
            self.notify([bell = std::move(bell), number = self.number()] { bell->ring(number); });
          },
          py::arg("bell").none(false))
      .def("end", &SessionTicket::end)
      .def("give_up", &SessionTicket::give_up, py::arg("seconds"));

  module.def(
      "queue_up", [](Context& context) { return queue_up(context); },
      py::arg("context").none(false));
  module.def(
      "queue_up",
      [](Context& context, const SessionTicket::List& around) { return context.queue_up(around); },
      py::arg("context").none(false), py::arg("around"));
}

}  // namespace pgk::python
