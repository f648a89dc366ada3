#include "core/session.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>

#include "core/address_table.h"
#include "core/blocking.h"
#include "core/manager.h"
#include "python/bindings.h"
#include "python/job.h"
#include "python/turns.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

// Work of ours that blocks may be reached with the GIL held: torch allocates under it.
void let_go_of_the_gil_to_block() {
  Blocking::set_hooks({
      .begin = []() -> void* { return PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr; },
      .end = [](void* state) { PyEval_RestoreThread(static_cast<PyThreadState*>(state)); },
  });
}

PyObject* running_loop = nullptr;  // asyncio's function

bool in_event_loop() {
  PyObject* loop = PyObject_CallNoArgs(running_loop);
  if (loop == nullptr) throw py::error_already_set();
  Py_DECREF(loop);
  return loop != Py_None;
}

// A session that knows the Python object of its context, and how long entering may wait for its
// turn: in seconds, or forever.
struct BoundSession : Session {
  BoundSession(py::object context, bool wait, std::optional<double> timeout)
      : Session(context.attr("_native").cast<std::shared_ptr<Context>>(), wait),
        owner(std::move(context)),
        timeout(timeout) {}
  py::object owner;
  std::optional<double> timeout;
};

}  // namespace

void bind_session(py::module_& module) {
  let_go_of_the_gil_to_block();
  running_loop =
      py::object(py::module_::import("asyncio").attr("_get_running_loop")).release().ptr();
  py::class_<ThreadStreams, std::unique_ptr<ThreadStreams, py::nodelete>>(module, "ThreadStreams");

  py::class_<Session>(module, "Session")
      .def(py::init<std::shared_ptr<Context>, bool, bool>(), py::arg("context").none(false),
           py::arg("ordered") = true, py::arg("keeps_active") = true)
      .def(
          "enter",
          [](Session& self, const py::object& ticket) { self.enter(ticket_or_none(ticket)); },
          py::arg("ticket") = py::none())
      .def("exit", &Session::exit)
      .def("leave", &Session::leave)
      .def("begin", &Session::begin)
      .def_property_readonly("has_work", &Session::has_work)
      .def("finish", &Session::finish)
      .def("follow", &Session::follow)
      .def("restore_stream", &Session::restore_stream, py::arg("stream"))
      .def("__enter__",
           [](const py::object& self) -> py::object {
             if (in_event_loop()) return self.attr("_enter_in_task")();
             auto& session = self.cast<Session&>();
             std::shared_ptr<SessionTicket> ticket;
             if (session.context().has_gates()) [[unlikely]] {
               ticket = queue_up(session.context());
               const auto timeout = py::getattr(self, "_timeout", py::none());
               if (ticket) await_turn(*ticket, timeout.cast<std::optional<double>>());
             }
             session.enter(std::move(ticket));
             return self;
           })
      .def("__exit__", [](const py::object& self, const py::object& kind,
                          const py::object& /*error*/, const py::object& /*traceback*/) {
        auto& session = self.cast<Session&>();
        if (in_event_loop() || !session.is_entered_here()) {
          self.attr("_exit_in_task")(kind);
        } else {
          session.exit();
        }
      });

  py::class_<BoundSession, Session>(module, "BoundSession")
      .def(py::init<py::object, bool, std::optional<double>>(), py::arg("context"),
           py::arg("wait") = true, py::arg("timeout") = std::nullopt)
      .def_readonly("context", &BoundSession::owner)
      .def_readonly("_timeout", &BoundSession::timeout);

  py::class_<Hold>(module, "Hold")
      .def(py::init<std::shared_ptr<Context>>(), py::arg("context").none(false))
      .def_static("take_if_ready", &Hold::take_if_ready, py::arg("context").none(false));

  py::class_<Job>(module, "Job")
      .def_static(
          "begin_session",
          [](std::shared_ptr<Context> context) {
            return Job([context = std::move(context)] { return std::make_shared<Hold>(context); });
          },
          py::arg("context").none(false))
      .def_static(
          "evict",
          [](std::shared_ptr<Context> context) {
            return Job([context = std::move(context)] {
              context->manager()->evict_context(*context);
              return nullptr;
            });
          },
          py::arg("context").none(false))
      .def_static(
          "restore",
          [](std::shared_ptr<Context> context) {
            return Job([context = std::move(context)] {
              context->manager()->restore_context(*context);
              return nullptr;
            });
          },
          py::arg("context").none(false))
      .def_static(
          "join",
          [](std::shared_ptr<Context> context) {
            return Job([context = std::move(context)] {
              context->manager()->join(*context);
              return nullptr;
            });
          },
          py::arg("context").none(false))
      .def("is_done", &Job::is_done)
      .def("notify", &Job::notify, py::arg("alarm").none(false))
      .def("result", &Job::result);

  module.def(
      "context_of",
      [](std::uintptr_t address) -> std::shared_ptr<Context> {
        const void* pointer = reinterpret_cast<const void*>(address);
        Context* context = AddressTable::owner_of(pointer);
        if (context == nullptr) context = AddressTable::segment_owner_of(pointer);
        return context == nullptr ? nullptr : context->shared_from_this();
      },
      py::arg("address"));
  module.def("current_context", []() -> std::shared_ptr<Context> {
    Context* context = current_context();
    return context == nullptr ? nullptr : context->shared_from_this();
  });
}

}  // namespace pgk::python
