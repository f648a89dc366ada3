#include "core/admission.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "python/arguments.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

using Stats = QosPolicyEvaluator::Stats;

// An enum whose members are equal to their names, which py::enum_ has not.
py::object make_decisions(py::module_& module) {
  py::list names;
  for (const Decision decision :
       {Decision::admit, Decision::throttle, Decision::queue, Decision::reject}) {
    names.append(py::make_tuple(to_string(decision), to_string(decision)));
  }
  py::object decisions = py::module_::import("enum").attr("StrEnum")(
      "QosDecision", names, py::arg("module") = module.attr("__name__"));
  module.add_object("QosDecision", decisions);
  return decisions;
}

void bind_task(py::module_& module) {
  py::class_<QosTaskMeta>(module, "QosTaskMeta")
      .def_static(
          "guaranteed",
          [](std::string id, std::string name, const py::object& memory,
             const py::object& bandwidth_request) {
            return QosTaskMeta::guaranteed(std::move(id), std::move(name),
                                           bytes_from("memory", memory),
                                           number_from("bandwidth_request", bandwidth_request));
          },
          py::arg("id"), py::arg("name"), py::arg("memory"), py::kw_only(),
          py::arg("bandwidth_request") = 0.0)
      .def_static(
          "burstable",
          [](std::string id, std::string name, const py::object& memory_request,
             const py::object& burst_ratio, const py::object& bandwidth_request) {
            return QosTaskMeta::burstable(std::move(id), std::move(name),
                                          bytes_from("memory_request", memory_request),
                                          number_from("burst_ratio", burst_ratio),
                                          number_from("bandwidth_request", bandwidth_request));
          },
          py::arg("id"), py::arg("name"), py::arg("memory_request"), py::arg("burst_ratio"),
          py::kw_only(), py::arg("bandwidth_request") = 0.0)
      .def_static("best_effort", &QosTaskMeta::best_effort, py::arg("id"), py::arg("name"))
      .def_readonly("id", &QosTaskMeta::id)
      .def_readonly("name", &QosTaskMeta::name)
      .def_readonly("qos_class", &QosTaskMeta::tier)
      .def_readonly("memory_request", &QosTaskMeta::memory_request)
      .def_readonly("memory_limit", &QosTaskMeta::memory_limit)
      .def_readonly("burst_ratio", &QosTaskMeta::burst_ratio)
      .def_property_readonly("bandwidth_request", [](const QosTaskMeta& self) {
        return to_double(self.bandwidth_request);
      });
}

void bind_evaluation(py::module_& module) {
  py::class_<Evaluation>(module, "QosEvaluation")
      .def_property_readonly("task_id", [](const Evaluation& self) { return self.task.id; })
      .def_property_readonly("qos_class", [](const Evaluation& self) { return self.task.tier; })
      .def_property_readonly("priority", &Evaluation::priority)
      .def_property_readonly("admitted", &Evaluation::admitted)
      .def_property_readonly("decision",
                             [decisions = make_decisions(module)](const Evaluation& self) {
                               return py::object(decisions.attr(to_string(self.decision)));
                             })
      .def_readonly("reason", &Evaluation::reason)
      .def_readonly("reserved_memory", &Evaluation::reserved_memory)
      .def_property_readonly("reserved_bandwidth", [](const Evaluation& self) {
        return to_double(self.reserved_bandwidth);
      });
}

template <QosPolicyEvaluator::Amounts Stats::* amounts>
std::size_t memory_of(const Stats& self) {
  return (self.*amounts).memory;
}

template <QosPolicyEvaluator::Amounts Stats::* amounts>
double bandwidth_of(const Stats& self) {
  return to_double((self.*amounts).bandwidth);
}

void bind_stats(py::module_& module) {
  py::class_<Stats>(module, "QosStats")
      .def_property_readonly("total_memory", &memory_of<&Stats::total>)
      .def_property_readonly("total_bandwidth", &bandwidth_of<&Stats::total>)
      .def_property_readonly("guaranteed_memory", &memory_of<&Stats::guaranteed>)
      .def_property_readonly("guaranteed_bandwidth", &bandwidth_of<&Stats::guaranteed>)
      .def_property_readonly("burstable_memory", &memory_of<&Stats::burstable>)
      .def_property_readonly("burstable_bandwidth", &bandwidth_of<&Stats::burstable>)
      .def_property_readonly("available_memory", &memory_of<&Stats::available>)
      .def_property_readonly("available_bandwidth", &bandwidth_of<&Stats::available>)
      .def_readonly("admitted", &Stats::admitted)
      .def_readonly("queued", &Stats::queued)
      .def_readonly("best_effort_queue", &Stats::best_effort_queue);
}

}  // namespace

// The evaluator has no lock: nothing here lets go of the GIL.
void bind_admission(py::module_& module) {
  bind_task(module);
  bind_evaluation(module);
  bind_stats(module);
  py::class_<QosPolicyEvaluator>(module, "QosPolicyEvaluator")
      .def(py::init([](const py::object& total_memory, const py::object& total_bandwidth) {
             return QosPolicyEvaluator(bytes_from("total_memory", total_memory),
                                       number_from("total_bandwidth", total_bandwidth));
           }),
           py::arg("total_memory"), py::arg("total_bandwidth") = 1.0)
      .def("evaluate", &QosPolicyEvaluator::evaluate, py::arg("task").none(false))
      .def("reserve", &QosPolicyEvaluator::reserve, py::arg("evaluation").none(false))
      .def("release", &QosPolicyEvaluator::release, py::arg("task_id"))
      .def("stats", &QosPolicyEvaluator::stats)
      .def("reset", &QosPolicyEvaluator::reset);
}

}  // namespace pgk::python
