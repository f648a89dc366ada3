"""The story of more models than fit: its parts, and all of it on the host device."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import oversubscribe_process, oversubscribe_ways, readme
from benchmarks.oversubscribe import QUICK, UPPER_BOUND, WAYS, Story, differing
from benchmarks.oversubscribe_process import Process, Served, prepare, processes, serve
from benchmarks.oversubscribe_ways import Pinned, Server, Swapped
from benchmarks.oversubscribe_work import (
    CAPACITY,
    IN_TURN,
    RATIOS,
    SKEWED,
    LeastRecentlyUsed,
    fitting,
    generated,
    llama,
    needed,
    requests,
    weight_bytes,
)
from pygpukit_torch import GB
from tests.quick_benchmarks import QuickBenchmarks

ROOT = Path(__file__).parents[1]

# Requests and models -----------------------------------------------------------------------------


def test_in_turn_every_model_is_asked_after_all_others() -> None:
    assert requests(IN_TURN, 3, 8, seed=5) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_skewed_requests_follow_zipfs_law() -> None:
    order = requests(SKEWED, 7, 50_000, seed=1)
    assert order == requests(SKEWED, 7, 50_000, seed=1)
    assert order[:20] == requests(SKEWED, 7, 20, seed=1)
    assert order[:20] != requests(SKEWED, 7, 20, seed=2)
    counts = Counter(order)
    assert set(counts) == set(range(7))
    for rank in range(2, 8):
        assert counts[6] / counts[7 - rank] == pytest.approx(rank, rel=0.1)


def test_models_are_as_large_as_the_story_says() -> None:
    weights = weight_bytes()
    assert sum(parameter.nbytes for parameter in llama(0).parameters()) == weights
    assert fitting(weights) == 3
    for ratio in RATIOS:
        models = needed(ratio, weights)
        assert models * weights >= ratio * CAPACITY > (models - 1) * weights


def test_models_differ_by_their_seed_only() -> None:
    first, again, other = llama(1), llama(1), llama(2)
    for one, two, three in zip(
        first.parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        # All ones: weights of norms.
        assert torch.equal(one, three) == bool((one == 1).all())
    assert generated(first) == generated(again)
    assert torch.get_default_dtype() == torch.float32


@given(st.integers(1, 4), st.lists(st.integers(0, 6)))
def test_the_least_recently_used_model_goes(places: int, used: list[int]) -> None:
    resident = LeastRecentlyUsed(places)
    expected: list[int] = []
    for model in used:
        gone = resident.use(model)
        expected = [other for other in expected if other != model] + [model]
        assert gone == (expected.pop(0) if len(expected) > places else None)
        assert [other for other in range(7) if other in resident] == sorted(expected)


def test_in_turn_no_model_is_resident_where_one_more_than_fits_is_asked() -> None:
    resident = LeastRecentlyUsed(3)
    found = []
    for model in requests(IN_TURN, 4, 20, seed=0):
        found.append(model in resident)
        resident.use(model)
    assert not any(found)


# Servers -----------------------------------------------------------------------------------------


class Noted(Swapped):
    """Notes what moves, and checks that no more models are there than fit."""

    def __init__(self) -> None:
        super().__init__(CAPACITY // 3)
        self.there: set[int] = set()
        self.ins: list[int] = []

    def make(self, index: int) -> None:
        super().make(index)
        self._arrived(index)

    def move_in(self, index: int) -> None:
        self.ins.append(index)
        self._arrived(index)

    def move_out(self, index: int) -> None:
        self.there.remove(index)

    def _arrived(self, index: int) -> None:
        assert index not in self.there
        self.there.add(index)
        assert len(self.there) <= 3


@contextmanager
def noted() -> Iterator[Noted]:
    """A server of five models that are numbers, and answer with themselves if they are there."""
    server = Noted()

    def answer(model: int) -> list[int]:
        assert model in server.there
        return [model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oversubscribe_ways, "llama", lambda seed: seed)
        patch.setattr(oversubscribe_ways, "generated", answer)
        for index in range(5):
            server.make(index)
        yield server


@given(st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 4)), min_size=1))
def test_models_are_swapped_in_when_they_are_asked(steps: list[tuple[int, int | None]]) -> None:
    with noted() as server:
        for index, following in steps:
            before = set(server.there)
            assert [each for each in range(5) if server.is_resident(each)] == sorted(before)
            server.ins.clear()
            assert server.serve(index, following) == [index]
            wanted = [index] if following in (None, index) else [index, following]
            assert server.there >= set(wanted)
            # One that was there may have gone for the first and come back as the second.
            assert set(wanted) - before <= set(server.ins) <= set(wanted)
            assert len(server.ins) == len(set(server.ins))


@pytest.mark.parametrize("name", ["pinned", "moved", "offloaded", "layered"])
def test_a_server_answers_as_the_model_alone(name: str) -> None:
    server = oversubscribe_ways.SERVERS[name](weight_bytes())
    for seed in range(5):
        server.make(seed)
    assert server.serve(0, 1) == generated(llama(0))
    assert server.serve(1, 4) == generated(llama(1))
    assert server.serve(4, None) == generated(llama(4))


def test_dropped_weights_are_those_of_the_copy() -> None:
    """So nothing of a model that was dropped keeps memory of the device."""
    server = Pinned(weight_bytes())
    for seed in range(4):
        server.make(seed)
    resident = [
        model
        for model in range(4)
        if not all(
            parameter.data_ptr() == copy.data_ptr()
            for parameter, copy in zip(
                server.models[model].parameters(), server.copies[model], strict=True
            )
        )
    ]
    assert resident == [1, 2, 3]
    assert [model for model in range(4) if server.is_resident(model)] == resident


# What a process does -----------------------------------------------------------------------------


class Scripted(Server):
    """Answers what it is told to, and says that only model 1 is resident."""

    def __init__(self, answers: dict[int, list[list[int]]]) -> None:
        super().__init__(CAPACITY)
        self.answers = answers
        self.told: list[int | None] = []

    def make(self, index: int) -> None:
        pass

    def is_resident(self, index: int) -> bool:
        return index == 1

    def serve(self, index: int, following: int | None) -> list[int]:
        self.told.append(following)
        self.moved += 100
        return self.answers[index].pop(0)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process is as one without a server, and stays as it is."""
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    prepared: list[Any] = []
    monkeypatch.setattr(oversubscribe_process, "_prepared", prepared)
    return prepared


def test_what_came_of_requests(no_server: list[Any]) -> None:
    server = Scripted({0: [[7, 7], [7, 8]], 1: [[9, 9], [9, 9]]})
    no_server.append((server, [[7, 7], [9, 9]]))
    served = serve([0, 1, 0, 1], ahead=True, seconds=100)
    assert server.told == [1, 0, 1, None]
    assert len(served.latencies) == 4
    assert (served.resident, served.wrong, served.moved) == (2, 1, 400)


def test_requests_without_knowing_the_next_until_the_time_is_over(no_server: list[Any]) -> None:
    server = Scripted({0: [[7]], 1: [[9]]})
    no_server.append((server, [[7], [9]]))
    assert serve([0, 1], ahead=False, seconds=0).latencies == []
    assert len(serve([0, 1], ahead=False, seconds=100).latencies) == 2
    assert server.told == [None, None]


def test_all_models_are_served_twice_and_must_answer_the_same(
    no_server: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oversubscribe_process, "RATIOS", (1, 2))
    monkeypatch.setattr(oversubscribe_process, "weight_bytes", lambda: CAPACITY)
    servers = iter(
        [Scripted({0: [[1], [1]], 1: [[2], [2]]}), Scripted({0: [[1]] * 2, 1: [[2], [3]]})]
    )
    monkeypatch.setitem(oversubscribe_ways.SERVERS, "scripted", lambda weights: next(servers))
    assert prepare("scripted") == [[1], [2]]
    assert len(no_server) == 1
    with pytest.raises(RuntimeError, match="answers differently the second time"):
        prepare("scripted")
    assert len(no_server) == 1


def test_what_fails_in_a_process_is_raised_here() -> None:
    with (
        pytest.raises(KeyError, match="no such server"),
        processes(["no such server"]) as running,
    ):
        running["no such server"].tokens()


# Failures ----------------------------------------------------------------------------------------


class Faked:
    """As a process: answers at once, or fails."""

    def __init__(self, tokens: list[Any], failing: bool = False, wrong: int = 0) -> None:
        self._tokens = tokens
        self._failing = failing
        self._wrong = wrong

    def tokens(self) -> list[Any]:
        if not self._tokens:
            raise ImportError("there is no accelerate\nhere")
        return self._tokens

    def serve(self, order: list[int], ahead: bool, seconds: float) -> Served:
        if self._failing:
            raise torch.OutOfMemoryError("out of memory\nwith details")
        return Served([0.5] * 3, resident=2, moved=3 << 30, wrong=self._wrong)


def test_servers_whose_models_answer_otherwise_are_named() -> None:
    assert differing({}) == {}
    assert differing({"a": [[1], [2]], "b": [[1], [2]]}) == {}
    assert differing({"a": [[1], [2], [3]], "b": [[1], [2], [3]], "c": [[1], [3], [2]]}) == {
        "c": "2 of 3 models answer otherwise than in 'a'"
    }


def test_failures_are_reported_in_their_rows() -> None:
    running = {way.server: Faked([[1], [2]]) for way in WAYS.values()}
    running |= {
        "pinned": Faked([[1], [2]], failing=True),
        "moved": Faked([[1], [3]]),
        "offloaded": Faked([[1], [2]], wrong=1),
        "layered": Faked([]),
    }
    story = Story(QUICK)
    story.wait(cast(dict[str, Process], running))
    for turn in range(2):
        story.turn(cast(dict[str, Process], running), turn)
    failures = {
        "pinned copies": "OutOfMemoryError: out of memory",
        "pinned, next ahead": "OutOfMemoryError: out of memory",
        ".cpu(), .cuda()": "1 of 2 models answer otherwise than in 'resident'",
        "accelerate, models": "2 of 6 answers are not the first of their model",
        "accelerate, layers": "ImportError: there is no accelerate",
    }
    for row in story.rows():
        assert row["failure"] == failures.get(row["way"], "")
        if "Error" in row["failure"]:
            assert (row["count"], row["requests/s"], row["ratio"]) == (0, "", "")
        else:
            assert (row["count"], row["requests/s"], row["ratio"]) == (6, 2, 1)
            assert (row["p50"], row["p99"]) == (500, 500)
            assert row["resident"] == pytest.approx(2 / 3)
            assert row["GiB moved"] == 1


# All of it ---------------------------------------------------------------------------------------


@pytest.fixture
def report(quick_benchmarks: QuickBenchmarks) -> dict[str, Any]:
    """What the story says on this machine; as if it had a GPU, which tables name."""
    found = quick_benchmarks.reports["oversubscribe"]
    return found | {"machine": found["machine"] | {"gpu": "GPU"}}


def test_every_way_serves_every_order_and_answers_the_same(report: dict[str, Any]) -> None:
    found = [(row["VRAM"], row["order"], row["way"]) for row in report["rows"]]
    ahead = {"contexts, prefetch", "pinned, next ahead"}
    assert ahead < set(WAYS)
    expected = [
        (ratio, order, way)
        for ratio in ("2x", "3x")
        for order in (IN_TURN, SKEWED)
        for way in WAYS
        if order == IN_TURN or way not in ahead
    ]
    assert found == expected
    assert [row["failure"] for row in report["rows"]] == [""] * len(expected)


def test_figures(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert 0 < row["count"] <= QUICK.count * QUICK.turns
        assert row["models"] == needed(int(row["VRAM"][0]), weight_bytes())
        assert row["requests/s"] > 0
        assert 0 < row["p50"] <= row["p99"]
        if row["way"] == UPPER_BOUND:
            assert (row["ratio"], row["resident"], row["GiB moved"]) == (1, 1, 0)
        elif row["way"] == "accelerate, layers":
            assert row["resident"] == 0
        elif row["order"] == SKEWED:
            assert 0 < row["resident"] < 1
        elif row["way"] in ("contexts", "pinned copies"):
            assert row["resident"] == 0
            assert row["GiB moved"] * GB > 0.9 * weight_bytes()


def test_the_table(report: dict[str, Any]) -> None:
    (broken,) = (
        row
        for row in report["rows"]
        if (row["VRAM"], row["order"], row["way"]) == ("3x", SKEWED, "accelerate, models")
    )
    rows = [row | {"failure": "broken"} if row is broken else row for row in report["rows"]]
    lines = readme.oversubscribe_table(report | {"rows": rows}).splitlines()
    columns = lines[0].count("|")
    assert columns == 6
    assert all(line.count("|") == columns for line in lines[:-2])
    assert [line.split(" | ")[0] for line in lines[2:-2]] == [f"| {way}" for way in WAYS]
    (line,) = (line for line in lines if line.startswith("| contexts |"))
    row = report["rows"][list(WAYS).index("contexts")]
    assert f"| {row['requests/s']:.3g} ({row['ratio']:.2f}), {row['p50']:.3g} /" in line
    (line,) = (line for line in lines if line.startswith("| accelerate, models |"))
    assert line.endswith("| failed |")
    assert line.count("failed") == 1
