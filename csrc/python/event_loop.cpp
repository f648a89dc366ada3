// The sessions of asyncio tasks. A task's open entries are in a context variable, so that it is
// the task's own and tasks made inside inherit it; each step of such a task runs in the context
// of the innermost. Here is what every step pays for: the callable that runs it, and the wrappers
// of the loop's methods that put it in front of callbacks (pygpukit_torch/event_loop.py).
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/session.h"
#include "python/bindings.h"
#include "python/event_fd.h"
#include "python/turns.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

PyObject* sessions = nullptr;  // the context variable: a tuple of TaskEntry, outermost first
PyObject* run_step = nullptr;  // run_step_in_session, as a callable
PyObject* context_name = nullptr;
PyObject* callback_name = nullptr;
PyObject* get_name = nullptr;

std::shared_ptr<Context> innermost(PyObject* entries) {
  if (entries == nullptr || !PyTuple_Check(entries)) return nullptr;
  for (Py_ssize_t i = PyTuple_GET_SIZE(entries); i-- > 0;) {
    const auto* entry = py::handle(PyTuple_GET_ITEM(entries, i)).cast<const TaskEntry*>();
    if (entry->is_open_here()) return entry->context();
  }
  return nullptr;
}

// New references, null if there are none.
PyObject* entries_here() {
  PyObject* value = nullptr;
  if (PyContextVar_Get(sessions, nullptr, &value) < 0) throw py::error_already_set();
  return value;
}

PyObject* entries_in(PyObject* context) {
  PyObject* value = PyObject_CallMethodOneArg(context, get_name, sessions);
  if (value == nullptr) throw py::error_already_set();
  return value;
}

// The contextvars.Context that the thread is in: each task has its own.
const void* this_variables() {
  return PyThreadState_Get()->context;
}

template <typename Function>
PyObject* translated(Function function) {
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// (callback, *args): what the loop runs instead of a callback whose context has sessions.
PyObject* run_step_in_session(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (count < 1) {
    PyErr_SetString(PyExc_TypeError, "run_step takes a callback");
    return nullptr;
  }
  return translated([&] {
    const auto entries = py::reinterpret_steal<py::object>(entries_here());
    const Step step(this_variables(), innermost(entries.ptr()));
    return PyObject_Vectorcall(args[0], args + 1, static_cast<std::size_t>(count - 1), nullptr);
  });
}

// (context, function, *args, **kwargs): the same for a task whose first step may run within.
PyObject* run_step_of(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count,
                      PyObject* names) {
  if (count < 2) {
    PyErr_SetString(PyExc_TypeError, "run_step_of takes a context and a function");
    return nullptr;
  }
  return translated([&] {
    const auto entries = py::reinterpret_steal<py::object>(entries_in(args[0]));
    const Step step(args[0], innermost(entries.ptr()));
    return PyObject_Vectorcall(args[1], args + 2, static_cast<std::size_t>(count - 2), names);
  });
}

// Self is (the loop's own method, the position of the callback in its arguments).
PyObject* schedule(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  PyObject* own = PyTuple_GET_ITEM(self, 0);
  const auto position = PyLong_AsSsize_t(PyTuple_GET_ITEM(self, 1));
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  PyObject* context = Py_None;
  Py_ssize_t callback = count > position ? position : -1;
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    if (PyUnicode_Compare(name, context_name) == 0) context = args[count + i];
    if (PyUnicode_Compare(name, callback_name) == 0) callback = count + i;
  }
  return translated([&] {
    const auto entries = py::reinterpret_steal<py::object>(
        PyContext_CheckExact(context) ? entries_in(context) : entries_here());
    const bool in_session = entries && PyTuple_Check(entries.ptr()) &&
                            PyTuple_GET_SIZE(entries.ptr()) > 0 && callback >= 0 &&
                            args[callback] != run_step;
    if (!in_session) {
      return PyObject_Vectorcall(own, args, static_cast<std::size_t>(count), names);
    }
    std::array<PyObject*, 8> few;
    std::vector<PyObject*> many;
    const auto total = static_cast<std::size_t>(count + named + 1);
    if (total > few.size()) many.resize(total);
    PyObject** wrapped = total > few.size() ? many.data() : few.data();
    if (callback >= count) {  // by name
      const py::object step =
          py::module_::import("functools")
              .attr("partial")(py::handle(run_step), py::handle(args[callback]));
      std::copy(args, args + count + named, wrapped);
      wrapped[callback] = step.ptr();
      return PyObject_Vectorcall(own, wrapped, static_cast<std::size_t>(count), names);
    }
    PyObject** end = std::copy(args, args + callback, wrapped);
    *end++ = run_step;
    std::copy(args + callback, args + count + named, end);
    return PyObject_Vectorcall(own, wrapped, static_cast<std::size_t>(count + 1), names);
  });
}

PyMethodDef run_step_method{
    "run_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&run_step_in_session)),
    METH_FASTCALL, nullptr};
PyMethodDef run_step_of_method{"run_step_of",
                               reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&run_step_of)),
                               METH_FASTCALL | METH_KEYWORDS, nullptr};
PyMethodDef schedule_method{"schedule",
                            reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&schedule)),
                            METH_FASTCALL | METH_KEYWORDS, nullptr};

py::object callable(PyMethodDef& method, PyObject* self) {
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self));
}

}  // namespace

SessionTicket::List tickets_of_task() {
  SessionTicket::List tickets;
  const auto entries = py::reinterpret_steal<py::object>(entries_here());
  if (!entries || !PyTuple_Check(entries.ptr())) return tickets;
  for (const py::handle item : entries) {
    const auto* entry = item.cast<const TaskEntry*>();
    if (entry->is_open_here() && entry->ticket()) tickets.push_back(entry->ticket());
  }
  return tickets;
}

void bind_event_loop(py::module_& module) {
  py::class_<EventFd, std::shared_ptr<EventFd>>(module, "Alarm")
      .def(py::init<>())
      .def("fileno", &EventFd::fileno);

  py::class_<TaskEntry, std::shared_ptr<TaskEntry>>(module, "TaskEntry")
      .def(py::init([](std::shared_ptr<Context> context, const py::object& task,
                       const py::object& ticket) {
             const void* entered_by = task.is_none() ? nullptr : task.ptr();
             return std::make_shared<TaskEntry>(std::move(context), entered_by, this_variables(),
                                                ticket_or_none(ticket));
           }),
           py::arg("context").none(false), py::arg("task"), py::arg("ticket") = py::none())
      .def("close", &TaskEntry::close)
      .def_property_readonly("is_open", &TaskEntry::is_open_here)
      .def("is_by",
           [](const TaskEntry& self, py::handle task) { return self.task() == task.ptr(); })
      .def_property_readonly(
          "is_of_these_variables",
          [](const TaskEntry& self) { return self.variables() == this_variables(); })
      .def_property_readonly("context", &TaskEntry::context);

  sessions = PyContextVar_New("pygpukit_torch.sessions", nullptr);
  context_name = PyUnicode_InternFromString("context");
  callback_name = PyUnicode_InternFromString("callback");
  get_name = PyUnicode_InternFromString("get");
  run_step = callable(run_step_method, nullptr).release().ptr();
  module.attr("sessions") = py::reinterpret_borrow<py::object>(sessions);
  module.attr("run_step") = py::reinterpret_borrow<py::object>(run_step);
  module.attr("run_step_of") = callable(run_step_of_method, nullptr);

  module.def(
      "scheduler",
      [](const py::object& own, std::size_t position) {
        return callable(schedule_method, py::make_tuple(own, position).ptr());
      },
      py::arg("own"), py::arg("position"));
  module.def("step_number", [] { return Step::number(this_variables()); });
  module.def("follow_task", [] {
    return Step::move_to(innermost(py::reinterpret_steal<py::object>(entries_here()).ptr()));
  });
}

}  // namespace pgk::python
