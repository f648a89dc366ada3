"""The story of latency beside best effort: its parts, and all of it on the host device."""

import math
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import latency, qos_moves
from benchmarks.beside import Operation, completions, repeated
from benchmarks.latency import back_to_back, open_loop, percentile, poisson_arrivals
from benchmarks.plots import qos
from benchmarks.qos_results import Results
from benchmarks.qos_ways import ways
from benchmarks.readme import qos_table
from tests.quick_benchmarks import QuickBenchmarks

# Figures -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_the_least_value_that_enough_do_not_exceed(
    values: list[float], part: float
) -> None:
    found = percentile(values, part)
    assert found in values
    assert sum(value <= found for value in values) >= part * len(values)
    assert sum(value < found for value in values) < max(part * len(values), 1)


def test_the_p99_of_few_is_the_largest() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3
    assert percentile([float(value) for value in range(1, 201)], 0.99) == 198


def test_poisson_arrivals() -> None:
    arrivals = poisson_arrivals(0.5, 20_000, seed=1)
    assert arrivals == poisson_arrivals(0.5, 20_000, seed=1)
    assert arrivals[:10] == poisson_arrivals(0.5, 10, seed=1)
    assert arrivals[:10] != poisson_arrivals(0.5, 10, seed=2)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0
    assert arrivals[-1] / 20_000 == pytest.approx(0.5, rel=0.03)
    # No other distribution has this of every part of its gaps.
    for multiple in (0.5, 1, 2):
        longer = sum(gap > multiple * 0.5 for gap in gaps) / len(gaps)
        assert longer == pytest.approx(math.exp(-multiple), abs=0.02)


@given(st.lists(st.floats(1e-3, 10), min_size=2, max_size=20), st.data())
def test_completions_count_whole_operations_and_parts_of_the_next(
    gaps: list[float], data: st.DataObject
) -> None:
    ends = [sum(gaps[: index + 1]) for index in range(len(gaps))]
    for count, end in enumerate(ends, 1):
        assert completions(ends, end) == count
    assert completions(ends, 0) == 0
    assert completions(ends, ends[-1] + 1) == len(ends)
    index = data.draw(st.integers(1, len(gaps) - 1))
    moment = ends[index - 1] + gaps[index] / 4
    assert completions(ends, moment) == pytest.approx(index + 0.25, abs=1e-6)


# Loops -------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody sleeps, and a little when he looks at it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def serve_2_s(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A request of two seconds, with a clock that the loops look at."""
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return lambda: clock.sleep(2)


def test_requests_back_to_back(serve_2_s: Callable[[], None]) -> None:
    assert back_to_back(serve_2_s, 3, 100) == pytest.approx([2, 2, 2], abs=1e-3)
    assert back_to_back(serve_2_s, 100, 5) == pytest.approx([2, 2, 2], abs=1e-3)


def test_latencies_of_an_open_loop_begin_with_the_arrival(serve_2_s: Callable[[], None]) -> None:
    latencies = open_loop(serve_2_s, [0, 1, 1.5, 10, 13], 100)
    assert latencies == pytest.approx([2, 3, 4.5, 2, 2], abs=1e-3)


def test_an_open_loop_that_does_not_keep_up_counts_those_that_wait(
    serve_2_s: Callable[[], None],
) -> None:
    latencies = open_loop(serve_2_s, [float(second) for second in range(100)], 9)
    served, waiting = [2, 3, 4, 5, 6], [5, 4, 3, 2, 1, 0]
    assert latencies == pytest.approx(served + waiting, abs=1e-3)


# Threads beside ----------------------------------------------------------------------------------


def test_an_operation_is_repeated_behind_its_border_until_the_block_ends() -> None:
    begun: Counter[threading.Thread] = Counter()
    many = threading.Event()

    @contextmanager
    def border() -> Any:
        begun[threading.current_thread()] += 100
        yield

    def submit() -> None:
        begun[threading.current_thread()] += 1
        if begun.total() > 110:
            many.set()

    with repeated(border, Operation(submit, queued=3)) as thread:
        assert begun.total() >= 103, "not steady"
        assert many.wait(30)
    (worker,) = begun
    assert worker is not threading.current_thread()
    assert not worker.is_alive()
    assert thread.completed(0, math.inf) == begun.total() - 100, "some were not waited for"


def test_nothing_is_measured_beside_an_operation_that_fails_at_once() -> None:
    def submit() -> None:
        raise ArithmeticError("of the thread")

    with (
        pytest.raises(ArithmeticError, match="of the thread"),
        repeated(nullcontext, Operation(submit)),
    ):
        pytest.fail("measured")


def test_what_an_operation_raises_later_is_raised_at_the_end() -> None:
    measuring = threading.Event()
    done: list[int] = []

    def submit() -> None:
        done.append(1)
        if len(done) > 1:
            assert measuring.wait(30)
            raise ArithmeticError("of the thread")

    with (
        pytest.raises(ArithmeticError, match="of the thread"),
        repeated(nullcontext, Operation(submit)),
    ):
        measuring.set()
    assert measuring.is_set()


def test_a_thread_ends_with_the_block_that_fails() -> None:
    before = threading.enumerate()
    with pytest.raises(KeyError), repeated(nullcontext, Operation(lambda: None)):
        raise KeyError
    assert threading.enumerate() == before


# All of it ---------------------------------------------------------------------------------------


@pytest.fixture
def report(quick_benchmarks: QuickBenchmarks) -> dict[str, Any]:
    """What the story says on this machine; as if it had a GPU, which the table names."""
    found = quick_benchmarks.reports["qos"]
    return found | {"machine": found["machine"] | {"gpu": "GPU"}}


def without_moving(report: dict[str, Any]) -> dict[str, Any]:
    """Results of before it was measured."""
    return report | {"rows": [row for row in report["rows"] if row["way"] != "moving"]}


def test_every_case_is_measured_in_every_way(report: dict[str, Any]) -> None:
    found = [
        (row["way"], row["request"], row["regime"], row["beside"], row[".item()"])
        for row in report["rows"]
    ]
    loads = ("matmul", "copies", "generate")
    expected = [(way.name, "nothing", "", load, "no") for way in ways() for load in loads]
    expected += [
        (way.name, request, regime, load, items)
        for way in ways()
        for load in ("nothing", *loads)
        for request, regime, items in (
            ("graph", "closed", "no"),
            ("graph", "closed", "yes"),
            ("graph", "Poisson", "no"),
            ("generate", "closed", "no"),
            ("generate", "Poisson", "no"),
        )
    ]
    expected += [
        ("moving", *case, "no")
        for case in (
            ("nothing", "", "moves"),
            ("graph", "closed", "nothing"),
            ("graph", "closed", "moves"),
            ("generate", "closed", "nothing"),
            ("generate", "closed", "moves"),
        )
    ]
    assert {"one stream", "tiers"} <= {way.name for way in ways()}
    assert Counter(found) == Counter(expected)


def test_figures_of_requests_and_of_best_effort(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        if row["request"] == "nothing":
            assert row["count"] == 0
        else:
            assert row["count"] > 0
            assert 0 < row["p50"] <= row["p90"] <= row["p99"]
            assert row["p99 ratio"] > 0
        if row["beside"] == "nothing":
            assert row["beside/s"] == row["kept"] == ""
        else:
            assert row["beside/s"] >= 0
    plain = [row for row in report["rows"] if row["way"] == "one stream" and row[".item()"] == "no"]
    alone = [row["p99 ratio"] for row in plain if row["beside"] == "nothing"]
    assert alone == pytest.approx([1, 1, 1, 1])
    assert [row["kept"] for row in plain if row["request"] == "nothing"] == [1, 1, 1]


def test_latencies_beside_moves_are_compared_with_those_alone_in_the_same_run(
    report: dict[str, Any],
) -> None:
    rows = {
        (row["request"], row["beside"]): row for row in report["rows"] if row["way"] == "moving"
    }
    for request in ("graph", "generate"):
        alone, beside = rows[request, "nothing"], rows[request, "moves"]
        assert alone["p99 ratio"] == 1
        assert beside["p99 ratio"] == pytest.approx(beside["p99"] / alone["p99"])
        assert alone["GB/s"] == ""
        assert beside["GB/s"] > 0
        kept = beside["GB/s"] / rows["nothing", "moves"]["GB/s"]
        assert beside["kept"] == pytest.approx(kept)
    assert all(row["GB/s"] == "" for row in report["rows"] if row["way"] != "moving")


def test_percentiles_beside_moves_are_of_enough_requests() -> None:
    size = qos_moves.FULL
    assert size.turns * size.limits["graph"][0] >= 300
    assert size.turns * size.limits["generate"][0] >= 100


def test_the_table(report: dict[str, Any]) -> None:
    lines = qos_table(without_moving(report)).splitlines()
    columns = lines[0].count("|")
    assert all(line.count("|") == columns for line in lines[:-2])
    for way in ways():
        assert sum(f"| {way.name} |" in line for line in lines) == 4
    (row,) = (
        row
        for row in report["rows"]
        if (row["way"], row["request"]) == ("tiers", "graph")
        and (row["regime"], row["beside"]) == ("Poisson", "copies")
    )
    (line,) = (line for line in lines if line.startswith("| graph, Poisson, p99 | tiers |"))
    assert f"| {row['p99 ratio']:.2f} ({row['kept']:.0%}) |" in line


def test_the_table_beside_moves(report: dict[str, Any]) -> None:
    before = qos_table(without_moving(report))
    table = qos_table(report)
    assert table.startswith(f"{before}\n\n| beside moves | ")
    rows = table.removeprefix(before).strip().splitlines()[:-2]
    assert len(rows) == 4
    assert len({line.count("|") for line in rows}) == 1
    (row,) = (
        row
        for row in report["rows"]
        if (row["way"], row["request"], row["beside"]) == ("moving", "graph", "moves")
    )
    (line,) = (line for line in table.splitlines() if line.startswith("| graph, closed | "))
    assert line.startswith(f"| graph, closed | {row['count']} | {row['p50']:.3g} (")
    assert f"| {row['p99']:.3g} ({row['p99 ratio']:.2f}) |" in line
    assert line.endswith(f"| {row['GB/s']:.3g} ({row['kept']:.0%}) |")


def test_what_is_shown_of_a_request(report: dict[str, Any]) -> None:
    results = Results(report)
    for load in results.loads:
        row = results.row(("graph", "closed"), "tiers", load)
        assert results.ratio(row) == pytest.approx(row["p99 ratio"])
        group = ("generate", "Poisson")
        row, alone = results.row(group, "tiers", load), results.row(group, "one stream", "nothing")
        assert results.ratio(row) == row["p90"] / alone["p90"]


def test_the_picture(report: dict[str, Any]) -> None:
    axes = qos(report).axes
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == [way.name for way in ways()]
    texts = Counter(text.get_text() for each in axes for text in each.texts)
    measured = [row for row in without_moving(report)["rows"] if row["regime"]]
    plain = [row for row in measured if row[".item()"] == "no"]
    kept = [f"{row['kept']:.0%}" for row in plain if row["kept"] != ""]
    ratios = [f"{Results(report).ratio(row):.2f}" for row in plain]
    assert texts == Counter(ratios + kept)
    circles = [line for each in axes for line in each.lines if line.get_marker() == "o"]
    assert len(circles) == len(measured) - len(plain)
    left, right = axes[0].get_xlim()
    assert all(left < numpy.asarray(circle.get_xdata()).item() < right for circle in circles)
