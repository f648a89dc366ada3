"""Memory moves only when nothing can touch it: work of every known kind, beside moves all the time.

Each tensor here is changed by a known number, so a write that is lost would show.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    GB,
    MB,
    ExecutionContext,
    QoSPolicy,
    context_session,
    create_context,
    get_stream,
    record_event,
    wait_event,
)
from tests.gpu.beside import beside
from tests.gpu.mover import Mover, words
from tests.gpu.test_memcheck import ROOT

pytestmark = pytest.mark.usefixtures("check_invariants")

SECONDS = 5  # that each of them takes
AHEAD = 4  # how many kernels are queued before somebody waits for them
SIZE = 256 * MB  # of what they change: in host memory a kernel takes some ten times as long


@pytest.fixture
def small(cuda: None) -> None:
    """6 GiB, with host memory for 24."""
    pgk.shutdown()
    pgk.initialize(device="cuda", total_vram=6 * GB, host_backup=24 * GB)


# One context reads or writes what another one has ------------------------------------------------


@pytest.mark.parametrize("how", ["idle", "destroyed", "declared"])
def test_who_makes_room_may_have_queued_work_on_what_must_go(small: None, how: str) -> None:
    a, b = create_context("a", 5 * GB), create_context("b", 5 * GB)
    with context_session(a):
        w = torch.ones(GB, dtype=torch.float32, device="cuda")
        event = record_event(a)
    with context_session(b):
        total = torch.zeros((), dtype=torch.float64, device="cuda")
        total += w.sum()
        torch.zeros(10, device="cuda")
    for _ in range(2):
        a.evict()
        a.restore()
    if how == "destroyed":
        a.destroy()
    with context_session(b):
        if how == "declared":
            wait_event(b, event)
        total.zero_()
        for _ in range(400):
            total += w.sum()
        if how == "declared":
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(3 * GB, dtype=torch.uint8, device="cuda")
        else:
            torch.empty(3 * GB, dtype=torch.uint8, device="cuda").fill_(255)
    assert total.item() == 400 * GB
    assert w.sum().item() == GB


def test_a_declared_consumer_waits_for_a_move_under_way() -> None:
    a, b = create_context("producer", 3 * GB), create_context("consumer", GB)
    x = words(a, 2 * GB)
    mover = Mover(a)
    count = 0
    end = time.monotonic() + SECONDS
    with beside(mover):
        while time.monotonic() < end:
            with context_session(a):
                event = record_event(a)
            time.sleep(0.003)
            with context_session(b):
                wait_event(b, event)
                for _ in range(30):
                    x.add_(1)
                    count += 1
    print(f"\n{len(mover.durations)} times out and in, {count} updates")
    assert len(mover.durations) >= 3
    assert x.min() == x.max() == count


# The guide's table: who may touch it without being told ------------------------------------------


def on(stream: torch.cuda.Stream, x: torch.Tensor) -> None:
    with torch.cuda.stream(stream):
        for _ in range(AHEAD):
            x.add_(1)
    stream.synchronize()


def on_the_default_stream(_: ExecutionContext, x: torch.Tensor) -> Callable[[], None]:
    return lambda: on(torch.cuda.default_stream(), x)


def on_its_own_stream(context: ExecutionContext, x: torch.Tensor) -> Callable[[], None]:
    own = get_stream(context)
    assert isinstance(own, torch.cuda.Stream)
    return lambda: on(own, x)


def on_a_recorded_stream(_: ExecutionContext, x: torch.Tensor) -> Callable[[], None]:
    side = torch.cuda.Stream()
    x.record_stream(side)
    return lambda: on(side, x)


def in_a_session_of_another(_: ExecutionContext, x: torch.Tensor) -> Callable[[], None]:
    other = create_context("other", GB)

    def update() -> None:
        with context_session(other):
            for _ in range(AHEAD):
                x.add_(1)

    return update


def by_a_graph(context: ExecutionContext, x: torch.Tensor) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with context_session(context), torch.cuda.graph(graph):
        for _ in range(AHEAD):
            x.add_(1)

    def replay() -> None:
        graph.replay()
        torch.cuda.default_stream().synchronize()

    return replay


UPDATES = [
    on_the_default_stream,
    on_its_own_stream,
    on_a_recorded_stream,
    in_a_session_of_another,
    by_a_graph,
]


@pytest.mark.parametrize("kind", UPDATES)
def test_no_update_is_lost_while_memory_moves(
    kind: Callable[[ExecutionContext, torch.Tensor], Callable[[], None]],
) -> None:
    context = create_context("a", 3 * GB)
    x = words(context, SIZE)
    update, mover, count = kind(context, x), Mover(context), 0

    def counted() -> None:
        nonlocal count
        update()
        count += AHEAD

    with beside(counted):
        mover.move_for(SECONDS)
    assert len(mover.durations) >= 3
    assert count > 0
    assert x.min() == x.max() == count


def test_no_update_of_a_daemon_thread_is_lost_nor_does_it_keep_the_context_in_use() -> None:
    context = create_context("a", 3 * GB)
    x = words(context, SIZE)
    mover, stop, count = Mover(context), threading.Event(), 0
    errors: list[BaseException] = []

    def update() -> None:
        nonlocal count
        try:
            while not stop.is_set():
                on(torch.cuda.current_stream(), x)
                count += AHEAD
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=update, daemon=True)
    with context_session(context):
        thread.start()
    try:
        mover.move_for(SECONDS)
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert len(mover.durations) >= 3
    assert x.min() == x.max() == count > 0


@pytest.mark.parametrize("how", ["pool", "plain"])
def test_evicting_waits_for_a_stream_that_was_recorded(how: str) -> None:
    context = create_context("a", 4 * GB)
    pool = None
    with context_session(context):
        if how == "pool":
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                x = torch.zeros(GB // 4, dtype=torch.int32, device="cuda")
        else:
            x = torch.zeros(GB // 4, dtype=torch.int32, device="cuda")
        x.add_(1)
        x.zero_()
    for _ in range(2):
        context.evict()
        context.restore()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(1000):
            x.add_(1)
    x.record_stream(side)
    was_busy = not side.query()
    context.evict()
    assert was_busy
    assert side.query()
    assert context.usage().evicted >= GB
    assert x.min() == x.max() == 1000
    del x, pool
    gc.collect()


def test_forty_streams_at_work() -> None:
    context = create_context("a", 2 * GB)
    x = words(context, SIZE)
    # Torch has 32 of each priority.
    streams = [torch.cuda.Stream() for _ in range(32)]
    streams += [torch.cuda.Stream(priority=-1) for _ in range(8)]
    assert len({stream.cuda_stream for stream in streams}) == 40
    parts = x.chunk(40)
    for stream in streams:
        x.record_stream(stream)
    torch.cuda.synchronize()
    mover, count = Mover(context), 0

    def update() -> None:
        nonlocal count
        for _ in range(AHEAD):
            for stream, part in zip(streams, parts, strict=True):
                with torch.cuda.stream(stream):
                    part.add_(1)
            count += 1
        for stream in streams:
            stream.synchronize()

    with beside(update):
        mover.move_for(SECONDS)
    assert len(mover.durations) >= 3
    assert x.min() == x.max() == count > 0


def test_a_pin_keeps_what_a_destroyed_context_left(small: None) -> None:
    a, b = create_context("a", 3 * GB), create_context("b", 5 * GB)
    x = words(a, 2 * GB)
    x.fill_(7)
    a.destroy()

    def evicted() -> int:
        return {one.name: one for one in pgk.stats().contexts}["a"].usage.evicted

    with context_session(b):
        with pgk.pin(x):
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(5 * GB - 256 * MB, dtype=torch.uint8, device="cuda")
            assert evicted() == 0
        torch.empty(5 * GB - 256 * MB, dtype=torch.uint8, device="cuda").fill_(255)
        assert evicted() > 0
    assert x.min() == x.max() == 7


# Entering ----------------------------------------------------------------------------------------


def test_entering_waits_for_the_default_stream_but_not_for_ever() -> None:
    pgk.shutdown()
    pgk.initialize(device="cuda", total_vram=6 * GB, host_backup=16 * GB, claim_timeout=1)
    context = create_context("guaranteed", 2 * GB, qos=QoSPolicy.GUARANTEED)
    x = words(context, GB)
    x.fill_(3)
    for cycles, is_short in [(500_000_000, True), (8_000_000_000, False)]:  # 0.3 s and 4 s
        context.evict()
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        start = time.perf_counter()
        if is_short:
            with context_session(context, wait=False):
                assert time.perf_counter() - start < 1
        else:
            with pytest.raises(torch.OutOfMemoryError, match="the default stream"):
                context_session(context).__enter__()
            assert 0.8 < time.perf_counter() - start < 3
            assert context.state == "idle"
        torch.cuda.synchronize()
        with context_session(context):
            assert context.usage().evicted == 0
            assert x.min() == x.max() == 3


# Everything at once ------------------------------------------------------------------------------


def test_a_short_storm(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.gpu.storm", "--seconds", "15", "--size", "4"]
    result = subprocess.run(
        [*command, "--report", str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(path.read_text())
    print("\n", {name: value for name, value in report.items() if isinstance(value, int)})
    assert report["checks"] > 100
    assert min(report[name] for name in ("handovers", "replays", "backwards")) > 0
    assert report["bytes_in"] > 8 * GB
