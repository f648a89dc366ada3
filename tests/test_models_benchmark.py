"""The story of models one at a time and at once: its parts, and all of it on the host device."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import peers, readme
from benchmarks.models import Size, Story
from benchmarks.models_at_once import EAGER, Model, lost_to_waiting, on_one_loop, on_threads
from benchmarks.models_cases import SESSIONS, STREAMS, SUBMITTED, TASKS
from benchmarks.peers import EXPANDABLE, NATIVE, OURS, Peer, PeerError, started
from pygpukit_torch import MB, create_context, current_context, initialize, shutdown
from tests.quick_benchmarks import QuickBenchmarks

ROOT = Path(__file__).parents[1]

# Peers -------------------------------------------------------------------------------------------


def test_a_peer_answers_what_it_is_asked_whatever_it_prints() -> None:
    with started(NATIVE, "tests.peer") as peer:
        for question in ("text\nof two lines", [1, 2.5, None], {"nested": {"key": [True]}}):
            assert peer.ask(question) == question


def test_what_a_peer_raises_is_the_answer_to_one_question() -> None:
    with started(NATIVE, "tests.peer") as peer:
        with pytest.raises(PeerError, match=r"^ArithmeticError: the first line$"):
            peer.ask("raise")
        with pytest.raises(PeerError, match=r"^AssertionError: no text$"):
            peer.ask("raise nothing")
        assert peer.ask("something else") == "something else"


def test_a_peer_that_ends_tells_its_last_words_every_time() -> None:
    with started(NATIVE, "tests.peer") as peer:
        for _ in range(3):
            with pytest.raises(PeerError, match=r"^ended with 3: its last words$"):
                peer.ask("die")


def test_a_peer_that_cannot_be_prepared_tells_why() -> None:
    with (
        started("broken", "tests.peer") as peer,
        pytest.raises(PeerError, match=r"^ended with 1: ImportError: of the peer$"),
    ):
        peer.ask("something")


def test_a_peer_ends_with_its_block() -> None:
    with started(NATIVE, "tests.peer") as peer:
        assert peer.ask("something") == "something"
    with pytest.raises(ValueError, match="closed file"):
        peer.ask("something")


def test_the_environment_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    expected = {OURS: None, NATIVE: None, EXPANDABLE: "expandable_segments:True"}
    for name, setting in expected.items():
        with started(name, "tests.peer") as peer:
            assert peer.ask("allocator") == setting


def test_ours_and_torchs_own_are_always_there() -> None:
    assert peers.names()[:2] == [OURS, NATIVE]


# At once -----------------------------------------------------------------------------------------


def test_threads_that_all_need_the_gil_are_off_their_cpus_for_it() -> None:
    def python() -> None:
        for _ in range(10_000):
            pass

    models = [Model(nullcontext, {EAGER: python}) for _ in range(3)]
    window = on_threads(models, EAGER, 0.2)
    assert all(rate > 0 for rate in window.rates)
    # However many CPUs there are, one of the three runs at a time.
    assert sum(1 - part for part in window.off_cpu) < 1.5


def test_threads_that_sleep_are_off_their_cpus() -> None:
    models = [Model(nullcontext, {EAGER: lambda: time.sleep(0.001)}) for _ in range(2)]
    window = on_threads(models, EAGER, 0.1)
    assert len(window.off_cpu) == 2
    assert all(0.5 < part <= 1 for part in window.off_cpu)


def test_tasks_work_in_their_own_contexts_on_one_thread() -> None:
    initialize(device="cpu", total_vram=64 * MB)
    contexts = [create_context(name, 16 * MB) for name in "abc"]
    found: Counter[tuple[str | None, int]] = Counter()

    def model(context: Any) -> Model:
        def submit() -> None:
            here = current_context()
            found[here.name if here else None, threading.get_ident()] += 1

        return Model(nullcontext, {EAGER: submit}, context)

    try:
        window = on_one_loop([model(context) for context in contexts], EAGER, 0.2)
    finally:
        for context in contexts:
            context.destroy()
        shutdown()
    assert set(found) == {(name, threading.get_ident()) for name in "abc"}
    assert min(found.values()) > 2, "one of them kept the others from working"
    assert all(rate > 0 for rate in window.rates)
    assert window.off_cpu == []


parts = st.floats(0, 1)


@given(st.lists(st.tuples(st.floats(0, 1.5), parts, parts), min_size=1, max_size=4))
def test_no_more_is_lost_to_waiting_than_is_lost(models: list[tuple[float, float, float]]) -> None:
    kept, off_cpu, alone = (list(each) for each in zip(*models, strict=True))
    lost = sum(max(0, 1 - part) for part in kept)
    assert 0 <= lost_to_waiting(kept, off_cpu, alone) <= lost
    assert lost_to_waiting(kept, alone, alone) == 0
    assert lost_to_waiting([0.0] * len(kept), [1.0] * len(kept), [0.0] * len(kept)) == len(kept)


def test_waiting_counts_as_far_as_it_is_more_than_alone() -> None:
    assert lost_to_waiting([0.5], [0.5], [0.0]) == pytest.approx(0.5)
    assert lost_to_waiting([0.5], [0.5], [0.25]) == pytest.approx(0.25)
    assert lost_to_waiting([0.9], [0.8], [0.0]) == pytest.approx(0.1)
    assert lost_to_waiting([0.6, 0.4], [0.7, 0.1], [0.0, 0.0]) == pytest.approx(0.5)
    # One that gained takes nothing from what the other lost.
    assert lost_to_waiting([1.2, 0.5], [0.0, 0.25], [0.0, 0.0]) == pytest.approx(0.25)


# Rows --------------------------------------------------------------------------------------------


class Said:
    """A process that answers from memory.

    It has rates of a work, by the way and the turn, what a model keeps of its rate beside others,
    and questions that it cannot answer.
    """

    def __init__(
        self, rates: dict[str, list[float]], kept: float = 1, fails: Iterable[str] = ()
    ) -> None:
        self._rates = rates
        self._kept = kept
        self._fails = tuple(fails)

    def ask(self, question: list[Any]) -> Any:
        if question[0] in self._fails:
            raise PeerError("out of order")
        match question:
            case ["units"]:
                return {"work": "words/s"}
            case ["rate", way, "work", turn]:
                return self._rates[way][turn]
            case ["window", how, _, models, _]:
                alone = len(models) == 1
                rates = [10.0 if alone else 10 * self._kept for _ in models]
                off_cpu = [] if how == "asyncio" else [0.1 if alone else 0.3 for _ in models]
                return {"rates": rates, "off_cpu": off_cpu}
        raise AssertionError(question)


def rows_of(processes: dict[str, Said]) -> list[dict[str, Any]]:
    story = Story(cast(Mapping[str, Peer], processes), Size(7, 0.1))
    story.measure()
    return story.rows()


# Peers have only every third turn.
OURS_SAID = Said(
    {"session": [20, 33, 33, 33, 33, 33, 44], "outside": [10, 30, 30, 30, 30, 30, 40]}, 0.8
)
NATIVE_SAID = Said({NATIVE: [10, 0, 0, 10, 0, 0, 80]}, 0.4)


def test_ratios_are_those_of_the_same_turn() -> None:
    rows = rows_of({OURS: OURS_SAID, NATIVE: NATIVE_SAID})
    works = {row["way"]: row for row in rows if row["at once"] == ""}
    assert [works[way]["rate"] for way in ("session", "outside", NATIVE)] == [33, 30, 10]
    assert works["session"]["to outside"] == pytest.approx(1.1)  # of 2, and six times 1.1
    assert works["session"]["to native"] == pytest.approx(2)  # of 2, 3.3 and 0.55
    assert works["outside"]["to outside"] == ""
    assert works[NATIVE]["to native"] == 1


def test_a_gain_is_what_all_keep_together() -> None:
    rows = rows_of({OURS: OURS_SAID, NATIVE: NATIVE_SAID})
    gains = {(row["at once"], row["way"]): row for row in rows if row["at once"] != ""}
    assert gains[1, SESSIONS]["rate"] == 10
    for way in (SESSIONS, TASKS):
        assert gains[2, way]["rate"] == pytest.approx(1.6)
        assert gains[3, way]["rate"] == pytest.approx(2.4)
        assert gains[3, way]["kept"] == [0.8, 0.8, 0.8]
        assert gains[3, way]["to native"] == pytest.approx(2)
    assert gains[2, STREAMS]["rate"] == pytest.approx(0.8)
    # Two threads sleep 0.2 more than alone; in sessions that is all that the models lose.
    assert gains[2, SESSIONS]["GIL at most"] == pytest.approx(0.4)
    assert gains[2, STREAMS]["GIL at most"] == pytest.approx(0.4)
    assert gains[3, STREAMS]["GIL at most"] == pytest.approx(0.6)
    assert gains[2, TASKS]["GIL at most"] == ""


def test_what_a_peer_cannot_do_is_said_in_its_rows() -> None:
    cannot = Said({}, fails=["rate"])
    rows = rows_of({OURS: OURS_SAID, NATIVE: NATIVE_SAID, EXPANDABLE: cannot})
    (row,) = (row for row in rows if row["way"] == EXPANDABLE)
    assert (row["failure"], row["rate"]) == ("out of order", "")
    assert all(row["failure"] == "" for row in rows if row["way"] != EXPANDABLE)


def test_nothing_is_compared_with_what_has_failed() -> None:
    ended = Said({}, fails=["units", "rate", "window"])
    for row in rows_of({OURS: OURS_SAID, NATIVE: ended}):
        assert row["to native"] == ""
        assert row["failure"] == ("out of order" if row["way"] in (NATIVE, STREAMS) else "")
        assert (row["rate"] == "") == bool(row["failure"])


# All of it ---------------------------------------------------------------------------------------


@pytest.fixture
def report(quick_benchmarks: QuickBenchmarks) -> dict[str, Any]:
    """What the story says on this machine; as if it had a GPU, which tables name."""
    found = quick_benchmarks.reports["models"]
    return found | {"machine": found["machine"] | {"gpu": "GPU"}}


def test_every_work_is_measured_in_every_way(report: dict[str, Any]) -> None:
    works = ("generate, batch 1", "generate, batch 16", "embedding", "training")
    alone = ("decode", "encode", "second decode")
    expected: list[tuple[int | str, str, str]]
    expected = [("", work, way) for work in works for way in ("session", "outside", NATIVE)]
    expected += [
        (1, f"{model}, {submitted}", way)
        for submitted in SUBMITTED
        for model in alone
        for way in (SESSIONS, STREAMS)
    ]
    expected += [
        (count, f"{' + '.join(alone[:count])}, {submitted}", way)
        for submitted in SUBMITTED
        for count in (2, 3)
        for way in (SESSIONS, TASKS, STREAMS)
    ]
    found = [(row["at once"], row["work"], row["way"]) for row in report["rows"]]
    others = [name for name in peers.names() if name not in (OURS, NATIVE)]
    assert Counter(each for each in found if each[2] not in others) == Counter(expected)
    assert Counter(each[2] for each in found if each[2] in others) == dict.fromkeys(others, 4)


def test_figures_of_every_row(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["failure"] == ""
        assert row["rate"] > 0
        low, high = map(float, row["quartiles"].split("-"))
        assert low <= row["rate"] * 1.01
        assert high >= row["rate"] * 0.99
        assert row["to native"] > 0
        if row["way"] in (NATIVE, STREAMS):
            assert row["to native"] == 1
        assert (row["to outside"] != "") == (row["way"] == "session")


def test_figures_of_models_at_once(report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row["at once"] != ""]
    for row in rows:
        count = row["at once"]
        assert len(row["off CPU"]) == (0 if row["way"] == TASKS else count)
        assert all(0 <= part <= 1 for part in row["off CPU"])
        assert row["unit"] == ("passes/s" if count == 1 else "of one by one")
        if count == 1:
            continue
        assert len(row["kept"]) == count
        assert all(part >= 0 for part in row["kept"])
        if row["way"] == TASKS:
            assert row["GIL at most"] == ""
        else:
            assert 0 <= row["GIL at most"] <= count


def test_the_tables(report: dict[str, Any]) -> None:
    failed = {"failure": "out of order", "rate": "", "to native": "", "quartiles": ""}
    rows = report["rows"]
    rows = [*rows, *({**row, "way": "a peer", **failed} for row in rows if row["way"] == NATIVE)]
    figures = {(row["work"], row["way"]): row for row in report["rows"]}

    lines = readme.models_table({**report, "rows": rows}).splitlines()
    columns = lines[0].count("|")
    assert all(line.count("|") == columns for line in lines[:-2])
    assert len(lines) == 2 + 4 + 2
    for line in lines[2:6]:
        work = line.split(" | ")[0].removeprefix("| ")
        native, session = (figures[work, way] for way in (NATIVE, "session"))
        assert f"| {native['rate']:.3g} {native['unit']} ({native['quartiles']}) |" in line
        assert f"| {session['to outside']:.3f} | {session['to native']:.3f} |" in line
        assert line.endswith("| failed |")

    lines = readme.at_once_table(report).splitlines()
    columns = lines[0].count("|")
    assert all(line.count("|") == columns for line in lines[:-2])
    assert len(lines) == 2 + 2 * len(SUBMITTED) + 2
    for line in lines[2:-2]:
        work = line.split(" | ")[0].removeprefix("| ")
        for way in (SESSIONS, TASKS, STREAMS):
            row = figures[work, way]
            kept = " + ".join(f"{part:.2f}" for part in row["kept"])
            assert f"| {row['rate']:.2f} ({kept})" in line
