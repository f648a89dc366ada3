#include "core/session.h"

#include <memory>
#include <utility>

#include "core/blocking.h"
#include "core/manager.h"
#include "python/bindings.h"
#include "python/job.h"

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

// A session that knows the Python object of its context.
struct BoundSession : Session {
  BoundSession(py::object owner, bool wait)
      : Session(owner.attr("_native").cast<std::shared_ptr<Context>>(), wait),
        context(std::move(owner)) {}
  py::object context;
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
      .def("enter", &Session::enter)
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
             self.cast<Session&>().enter();
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
      .def(py::init<py::object, bool>(), py::arg("context"), py::arg("wait") = true)
      .def_readonly("context", &BoundSession::context);

  py::class_<Hold>(module, "Hold")
      .def(py::init<std::shared_ptr<Context>>(), py::arg("context").none(false));

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
      .def("is_done", &Job::is_done)
      .def("notify", &Job::notify, py::arg("alarm").none(false))
      .def("result", &Job::result);

  module.def("current_context", []() -> std::shared_ptr<Context> {
    Context* context = current_context();
    return context == nullptr ? nullptr : context->shared_from_this();
  });
}

}  // namespace pgk::python
