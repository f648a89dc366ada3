"""Recorded, saved, converted and replayed traces."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pygpukit_torch as pgk
from pygpukit_torch import MB, native
from pygpukit_torch.trace import Allocation, ContextMemory, Event, Free, Trace


class Books:
    """An allocator that keeps books and nothing else."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[int, int]] = {}
        self.calls = 0

    def allocate(self, size: int, stream: int) -> int:
        self.calls += 1
        self.live[self.calls] = (size, stream)
        return self.calls

    def free(self, address: int) -> None:
        del self.live[address]

    def peak_reserved_bytes(self) -> int:
        return 123


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    events: list[Event] = []
    live: list[int] = []
    count = 0
    for _ in range(draw(st.integers(0, 30))):
        if live and draw(st.booleans()):
            events.append(Free(live.pop(draw(st.integers(0, len(live) - 1)))))
        else:
            events.append(Allocation(draw(st.integers(1, MB)), draw(st.integers(0, 2))))
            live.append(count)
            count += 1
    return Trace(tuple(events))


# Recording --------------------------------------------------------------------------------------


def test_sizes_order_and_lifetimes() -> None:
    with pgk.record("cpu") as recording:
        a = torch.empty(100, dtype=torch.float32)
        b = a.double()
        del a
        c = b[:10].add_(1)  # a view: no memory of its own
        d = c + 1
        del b
        e = torch.ones(3)
        del c  # with it goes the storage of b
    assert recording.trace.events == (
        Allocation(400),
        Allocation(800),
        Free(0),
        Allocation(80),
        Allocation(12),
        Free(1),
    )
    assert recording.trace.peak_live_bytes == 1200
    assert len(recording.trace) == 6
    del d, e
    assert len(recording.trace) == 6, "what still lived at the end is not freed"


def test_what_was_there_before_is_not_recorded() -> None:
    weight = torch.ones(10, 10)
    with pgk.record("cpu") as recording:
        weight.t().add_(1)
        result = weight @ weight
        del weight
    assert recording.trace.events == (Allocation(400),)
    del result


def test_data_from_python_is_recorded_and_memory_of_others_is_not() -> None:
    with pgk.record("cpu") as recording:
        kept = torch.tensor([1, 2, 3]), torch.from_numpy(np.ones(100))
    assert Allocation(24) in recording.trace.events
    assert all(
        event.size < 800 for event in recording.trace.events if isinstance(event, Allocation)
    )
    del kept


def test_a_storage_that_grows_is_a_new_allocation() -> None:
    outside = torch.empty(4)
    with pgk.record("cpu") as recording:
        x = torch.empty(0)
        x.resize_(10)
        x.resize_(20)
        outside.resize_(100)
    assert recording.trace.events == (
        Allocation(40),
        Free(0),
        Allocation(80),
        Allocation(400),
    )


def test_a_training_step_with_its_backward_pass() -> None:
    model = torch.nn.Linear(8, 4, bias=False)
    with pgk.record("cpu") as recording:
        model(torch.ones(2, 8)).sum().backward()
    sizes = [event.size for event in recording.trace.events if isinstance(event, Allocation)]
    assert 8 * 4 * 4 in sizes, "the gradient of the weights"
    assert sizes[:2] == [2 * 8 * 4, 2 * 4 * 4]
    live = len(sizes) - sum(isinstance(event, Free) for event in recording.trace.events)
    assert live == 1, "nothing but the gradient stays"


def test_only_the_device_that_was_asked_for() -> None:
    with pgk.record("meta") as recording:
        torch.ones(3)
        large = torch.empty(1 << 40, dtype=torch.uint8, device="meta")
    assert recording.trace.events == (Allocation(1 << 40),)
    del large


@pytest.mark.usefixtures("scheduler")
def test_what_a_session_serves_is_recorded_as_well() -> None:
    context = pgk.create_context("a", 32 * MB)
    with pgk.context_session(context), pgk.record("cpu") as recording:
        x = torch.empty(MB, dtype=torch.uint8)
    assert recording.trace.events == (Allocation(MB),)
    assert context.usage().used == MB
    del x


def test_an_error_ends_the_recording_and_keeps_it() -> None:
    def fail() -> None:
        with pgk.record("cpu") as recordings[0]:
            torch.ones(2)
            raise KeyError

    recordings: list[Any] = [None]
    with pytest.raises(KeyError):
        fail()
    kept = torch.ones(5)
    assert recordings[0].trace.events == (Allocation(8), Free(0))
    del kept


# Broken traces ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([Allocation(512), Free(1)], "event 1 frees allocation 1, which was not made before"),
        ([Free(0), Allocation(512)], "event 0 frees allocation 0, which was not made before"),
        ([Allocation(512), Free(0), Free(0)], "event 2 frees allocation 0 a second time"),
        ([Allocation(-4)], "event 0: size must be positive"),
        ([Allocation(0)], "event 0: size must be positive"),
        ([Allocation(4, -1)], "event 0: stream must be at least 0"),
        ([Allocation(4), Free(-1)], "event 1: allocation must be at least 0"),
    ],
)
def test_broken_traces(events: list[Event], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Trace(tuple(events))


def test_sizes_are_ints() -> None:
    with pytest.raises(TypeError, match="event 0: size must be a whole number of bytes"):
        Trace((Allocation(1.5),))  # type: ignore[arg-type]


# Files ------------------------------------------------------------------------------------------


@given(trace=traces())
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "a.jsonl"
    trace.save(path)
    assert Trace.load(path) == trace


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("", "is not a trace of this version"),
        ('"pygpukit_torch trace 9"\n', "is not a trace of this version"),
        ('"pygpukit_torch trace 1"\n[1]\n{"a": 1', "line 3 is not an event"),
        ('"pygpukit_torch trace 1"\n[1, 0, 0]\n', "line 2 is not an event"),
        ('"pygpukit_torch trace 1"\n[8, 0]\n1\n', "event 1 frees allocation 1"),
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, lines: str, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=text):
        Trace.load(path)


def test_the_format_of_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Trace((Allocation(512), Allocation(8, 1), Free(0))).save(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        "pygpukit_torch trace 1",
        [512, 0],
        [8, 1],
        0,
    ]


# Snapshots --------------------------------------------------------------------------------------


def entry(action: str, addr: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "stream": stream, "frames": []}


def segment(stream: int, *blocks: tuple[str, int]) -> dict[str, Any]:
    """Blocks by state and size, one behind the other from the address of the first stream on."""
    return {
        "device": 0,
        "address": 0x1000 * (stream + 1),
        "stream": stream,
        "blocks": [{"state": state, "size": 512, "requested_size": size} for state, size in blocks],
    }


def test_a_history_with_what_was_there_before_it() -> None:
    history = [
        entry("segment_alloc", 0x8000, 2 * MB),
        entry("alloc", 0x8000, 1000, 7),
        entry("free_requested", 0x9000, 300, 0),
        entry("free_completed", 0x9000, 300, 0),  # allocated before the history
        entry("free_requested", 0x8000, 1000, 7),
        entry("alloc", 0x9000, 40, 0),
        entry("free_completed", 0x8000, 1000, 7),
        entry("alloc", 0x8000, 8, 7),
    ]
    segments = [
        segment(0, ("active_allocated", 500), ("inactive", 0), ("active_awaiting_free", 200)),
        # In the history already.
        {**segment(7, ("active_allocated", 8)), "address": 0x8000},
        {**segment(0, ("active_allocated", 9)), "device": 1},
    ]
    trace = Trace.from_snapshot({"device_traces": [history], "segments": segments})
    assert trace.events == (
        Allocation(300, 0),
        Allocation(500, 0),
        Allocation(200, 0),
        Allocation(1000, 1),
        Free(0),
        Allocation(40, 0),
        Free(3),
        Allocation(8, 1),
    )


def test_the_history_of_another_device() -> None:
    snapshot = {"device_traces": [[], [entry("alloc", 1, 8)]], "segments": []}
    assert Trace.from_snapshot(snapshot, device=1).events == (Allocation(8),)
    for device in (0, 2):
        with pytest.raises(ValueError, match=f"no history of device {device}"):
            Trace.from_snapshot(snapshot, device)


def test_a_history_that_is_broken() -> None:
    history = [entry("alloc", 0x10, 8), entry("alloc", 0x10, 8)]
    with pytest.raises(ValueError, match="0x10 twice"):
        Trace.from_snapshot({"device_traces": [history]})


# Replaying --------------------------------------------------------------------------------------


@given(trace=traces())
def test_replaying_does_what_the_trace_says_and_leaves_nothing(trace: Trace) -> None:
    books = Books()
    replay = trace.replay(books)
    assert books.calls == sum(isinstance(event, Allocation) for event in trace.events)
    assert books.live == {}
    assert (replay.peak_live_bytes, replay.peak_reserved_bytes) == (trace.peak_live_bytes, 123)


def test_streams_reach_the_allocator() -> None:
    class Seen(Books):
        def free(self, address: int) -> None:
            freed.append(self.live.pop(address))

    freed: list[tuple[int, int]] = []
    Trace((Allocation(8, 2), Allocation(9), Free(0))).replay(Seen())
    assert freed == [(8, 2), (9, 0)]


def test_on_a_context_of_a_native_device() -> None:
    trace = Trace((Allocation(3 * MB), Allocation(3 * MB, 1), Free(0), Allocation(MB), Free(1)))
    memory = ContextMemory(native.HostDevice(64 * MB))
    replay = trace.replay(memory)
    assert replay.peak_live_bytes == 6 * MB
    # Pages are of 2 MiB, and a stream has pages of its own.
    assert replay.peak_reserved_bytes == 8 * MB
    assert replay.ratio == pytest.approx(8 / 6)
    assert memory.context.used_bytes == 0


def test_a_budget_that_is_too_small_leaves_nothing_behind() -> None:
    memory = ContextMemory(native.HostDevice(64 * MB), 4 * MB)
    with pytest.raises(torch.OutOfMemoryError):
        Trace((Allocation(3 * MB), Allocation(3 * MB))).replay(memory)
    assert memory.context.used_bytes == 0


def test_a_trace_of_nothing() -> None:
    assert Trace(()).replay(Books()).ratio == 1.0
    assert repr(Trace(())) == "<Trace: 0 events, at most 0 B live>"
