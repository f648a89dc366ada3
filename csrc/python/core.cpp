// The pure parts, bound so that property tests can drive them without a device.
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/arena.h"
#include "core/eviction.h"
#include "core/ledger.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

using Run = std::tuple<std::uint32_t, std::uint32_t>;  // first page, count

void bind_ledger(py::module_& module) {
  py::class_<Ledger>(module, "Ledger")
      .def(py::init<std::size_t, std::size_t>(), py::arg("capacity"), py::arg("host_limit") = 0)
      .def("open", &Ledger::open, py::arg("max"), py::arg("base"),
           py::arg_v("tier", Tier::burstable, "Tier.burstable"),
           py::arg("partition") = Ledger::kDevice, py::arg("page") = 1)
      .def("open_partition", &Ledger::open_partition, py::arg("limit"))
      .def("close_partition", &Ledger::close_partition, py::arg("partition"))
      .def("assign", &Ledger::assign, py::arg("account"), py::arg("partition"))
      .def("close", &Ledger::close, py::arg("account"))
      .def("resize", &Ledger::resize, py::arg("account"), py::arg("max"), py::arg("base"))
      .def("charge", &Ledger::charge, py::arg("account"), py::arg("bytes"))
      .def("refund", &Ledger::refund, py::arg("account"), py::arg("bytes"))
      .def("evict", &Ledger::evict, py::arg("account"), py::arg("bytes"))
      .def("restore", &Ledger::restore, py::arg("account"), py::arg("bytes"))
      .def("refund_evicted", &Ledger::refund_evicted, py::arg("account"), py::arg("bytes"))
      .def("room", &Ledger::room, py::arg("account"))
      .def("restorable", &Ledger::restorable, py::arg("account"))
      .def("free_for", &Ledger::free_for, py::arg("account"))
      .def("shortage", &Ledger::shortage, py::arg("account"), py::arg("bytes"),
           py::arg("returning") = 0)
      .def("shortage_in_partition", &Ledger::shortage_in_partition, py::arg("account"),
           py::arg("bytes"))
      .def(
          "spare",
          [](const Ledger& self, Ledger::Id holder, Ledger::Id account) {
            return Ledger::spare(self.account(holder), self.account(account).tier);
          },
          py::arg("holder"), py::arg("account"))
      .def("evictable", &Ledger::evictable, py::arg("of_loans"))
      .def("check_invariants", &Ledger::check_invariants)
      .def_property_readonly("capacity", &Ledger::capacity)
      .def_property_readonly("resident", py::overload_cast<>(&Ledger::resident, py::const_))
      .def_property_readonly("evicted", &Ledger::evicted)
      .def_property_readonly("lent", [](const Ledger& self) { return self.lent(); })
      .def_property_readonly("uncommitted", [](const Ledger& self) { return self.uncommitted(); });
}

void bind_arena(py::module_& module) {
  py::class_<Arena>(module, "Arena")
      .def(py::init<std::size_t, std::uint32_t, std::uint32_t>(), py::arg("page_bytes"),
           py::arg("page_count"), py::arg("upper_zone") = Arena::kNone)
      .def(
          "allocate",
          [](Arena& self, std::uint32_t granules,
             Arena::Lane lane) -> std::optional<std::uint32_t> {
            const std::uint32_t start = self.allocate(granules, lane);
            if (start == Arena::kNone) return std::nullopt;
            return start;
          },
          py::arg("granules"), py::arg("lane") = 0)
      .def("add_lane", &Arena::add_lane, py::arg("upper") = false)
      .def("adopt", &Arena::adopt, py::arg("source"), py::arg("target"))
      .def("release", &Arena::release, py::arg("start"))
      .def("fence", &Arena::fence, py::arg("start"))
      .def("unfence", &Arena::unfence, py::arg("start"))
      .def(
          "plan_growth",
          [](const Arena& self, std::uint32_t granules, Arena::Lane lane) -> std::optional<Run> {
            const auto plan = self.plan_growth(granules, lane);
            if (!plan) return std::nullopt;
            return Run{plan->first, plan->count};
          },
          py::arg("granules"), py::arg("lane") = 0)
      .def(
          "add_pages",
          [](Arena& self, std::uint32_t first, std::uint32_t count, Arena::Lane lane) {
            self.add_pages({first, count}, lane);
          },
          py::arg("first"), py::arg("count"), py::arg("lane") = 0)
      .def(
          "free_runs",
          [](Arena& self, std::optional<Run> beside) {
            std::optional<Arena::PageRun> pages;
            if (beside) pages = Arena::PageRun{std::get<0>(*beside), std::get<1>(*beside)};
            std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>> runs;
            for (const Arena::FreeRun& run : self.free_runs(pages)) {
              runs.emplace_back(run.block, run.pages.first, run.pages.count);
            }
            return runs;
          },
          py::arg("beside") = std::nullopt)
      .def(
          "retire",
          [](Arena& self, std::uint32_t block, std::uint32_t first, std::uint32_t count) {
            self.retire({block, {first, count}});
          },
          py::arg("block"), py::arg("first"), py::arg("count"))
      .def(
          "finish_retirement",
          [](Arena& self, std::uint32_t first, std::uint32_t count, std::uint32_t removed) {
            self.finish_retirement({first, count}, removed);
          },
          py::arg("first"), py::arg("count"), py::arg("removed"))
      .def("count_free_pages", &Arena::count_free_pages)
      .def("check_invariants", &Arena::check_invariants)
      .def_property_readonly("used_bytes", &Arena::used_bytes)
      .def_property_readonly("peak_bytes", &Arena::peak_bytes)
      .def_property_readonly("fenced_bytes", &Arena::fenced_bytes)
      .def_property_readonly("page_bytes", &Arena::page_bytes)
      .def_property_readonly("resident_pages", &Arena::resident_pages)
      .def_property_readonly("live_blocks", &Arena::live_blocks);
}

void bind_eviction(py::module_& module) {
  py::class_<Holder>(module, "Holder")
      .def(py::init([](std::uint64_t id, Tier tier, bool orphan, bool active,
                       std::uint64_t last_use, std::size_t spare, std::size_t page, bool mate) {
             return Holder{id, tier, orphan, active, mate, last_use, spare, page};
           }),
           py::arg("id"), py::arg("tier"), py::arg("orphan"), py::arg("active"),
           py::arg("last_use"), py::arg("spare"), py::arg("page"), py::arg("mate") = true);
  module.def(
      "plan_eviction",
      [](Tier tier, bool of_base, std::size_t bytes, std::vector<Holder> holders,
         std::size_t bytes_of_mates) {
        std::vector<std::tuple<std::uint64_t, std::size_t, bool>> plan;
        for (const Eviction& step :
             plan_eviction({tier, of_base, bytes, bytes_of_mates}, std::move(holders))) {
          plan.emplace_back(step.id, step.bytes, step.active);
        }
        return plan;
      },
      py::arg("tier"), py::arg("of_base"), py::arg("bytes"), py::arg("holders"),
      py::arg("bytes_of_mates") = 0);
}

}  // namespace

void bind_core(py::module_& module) {
  py::enum_<Tier>(module, "Tier")
      .value("best_effort", Tier::best_effort)
      .value("burstable", Tier::burstable)
      .value("guaranteed", Tier::guaranteed);
  bind_ledger(module);
  bind_arena(module);
  bind_eviction(module);
}

}  // namespace pgk::python
