"""Who has nothing to do with the memory that moves goes on, and is right: events between contexts,
host functions, floods, captures, graphs with matrix products."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    GB,
    MB,
    QoSPolicy,
    context_session,
    create_context,
    record_event,
    wait_event,
)
from tests.gpu.beside import at_once, beside
from tests.gpu.mover import Mover, words
from tests.gpu.test_graphs import captured, work

pytestmark = pytest.mark.usefixtures("check_invariants")

PATIENCE = 60  # seconds; who takes longer hangs

HOST_FUNCTION = """
#include <atomic>
#include <chrono>
#include <thread>
extern "C" {
std::atomic<long> done;
// At most 50 ms.
void wait_for(void* step) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  while (done < reinterpret_cast<long>(step) && std::chrono::steady_clock::now() < end)
    std::this_thread::sleep_for(std::chrono::microseconds(50));
}
}
"""


@pytest.fixture
def host_function(tmp_path: Path) -> ctypes.CDLL:
    """``wait_for(step)`` until ``done`` has come to it; not in Python, since that has a lock."""
    source, library = tmp_path / "host.cpp", tmp_path / "host.so"
    source.write_text(HOST_FUNCTION)
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def test_two_contexts_hand_over_without_pause_while_a_third_moves(
    host_function: ctypes.CDLL,
) -> None:
    a, b, third = (create_context(name, GB) for name in ("a", "b", "third"))
    x, moved = words(a, 4 * MB), words(third, 512 * MB)
    done = ctypes.c_long.in_dll(host_function, "done")
    wait_for = ctypes.cast(host_function.wait_for, ctypes.c_void_p)
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
    launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    to_a: queue.Queue[pgk.ContextEvent | pgk.CudaContextEvent | None] = queue.Queue()
    to_b: queue.Queue[pgk.ContextEvent | pgk.CudaContextEvent] = queue.Queue()
    to_a.put(None)
    begun = 0
    times: list[float] = []

    def forth() -> None:
        nonlocal begun
        try:
            event = to_a.get(timeout=1)
        except queue.Empty:
            return  # the other one has stopped, or the assertions below tell
        with context_session(a, wait=False):
            if event is not None:
                wait_event(a, event)
            x.add_(1)
            begun += 1
            to_b.put(record_event(a))
            assert launch(a.stream.id, wait_for, begun) == 0

    def back() -> None:
        try:
            event = to_b.get(timeout=1)
        except queue.Empty:
            return
        with context_session(b, wait=False):
            wait_event(b, event)
            x.add_(1)
            event = record_event(b)
        to_a.put(event)
        event.synchronize()
        times.append(time.perf_counter())
        done.value = len(times)

    mover = Mover(third)
    with beside(forth), beside(back):
        mover.move_for(6)
        times_beside = times.copy()
    pauses = [after - before for before, after in itertools.pairwise(times_beside)]
    print(f"  {len(times)} hand-overs, longest pause {max(pauses):.3f} s")
    print(f"  longest move {max(mover.durations):.3f} s")
    assert len(mover.durations) >= 3
    assert max(mover.durations) < 1
    assert max(pauses) < 1
    a.stream.synchronize()
    assert x.min() == x.max() == begun + len(times)
    assert moved.max().item() == 0


def test_moves_beside_a_flood_and_a_guaranteed_graph() -> None:
    low = create_context("low", 2 * GB, qos=QoSPolicy.BEST_EFFORT)
    high = create_context("high", GB, qos=QoSPolicy.GUARANTEED)
    third = create_context("third", 2 * GB)
    moved = words(third, GB)
    moved.fill_(5)
    graph = captured(high, 1)
    expected = work(graph[1])
    with context_session(low):
        m = torch.randint(-2, 3, (4096, 4096), device="cuda").float()
        right = m @ m  # of integers: exact
        y = torch.empty_like(m)
    queued: deque[torch.cuda.Event] = deque()

    def flood() -> None:
        with context_session(low, wait=False):
            torch.mm(m, m, out=y)
            queued.append(torch.cuda.current_stream().record_event())
        if len(queued) > 8:
            queued.popleft().synchronize()

    def replay() -> None:
        with context_session(high):
            graph[0].replay()
            torch.testing.assert_close(graph[2], expected)

    mover = Mover(third)
    with beside(flood), beside(replay):
        deadline = time.monotonic() + PATIENCE
        while len(mover.durations) < 5 and time.monotonic() < deadline:
            mover()
            assert moved.min() == moved.max() == 5
    print(f"\n5 moves took {sum(mover.durations):.2f} s, {mover.refused} refused")
    assert len(mover.durations) == 5
    low.stream.synchronize()
    assert torch.equal(y, right)


@pytest.mark.parametrize("how", ["default", "thread_local", "raw"])
def test_a_hundred_captures_while_others_move(how: str) -> None:
    capturing = create_context("capturing", GB)
    others = [create_context(name, GB) for name in ("b", "c")]
    moved = [words(other, 512 * MB) for other in others]
    mover, stop = Mover(*others), threading.Event()
    captured_graphs = 0
    side = torch.cuda.Stream()
    with context_session(capturing):
        x = torch.zeros(1000, device="cuda")

    def capture(graph: torch.cuda.CUDAGraph) -> torch.Tensor:
        if how == "raw":  # outside of sessions
            with torch.cuda.stream(side):
                graph.capture_begin()
                y = x * 2
                graph.capture_end()
            return y
        mode = "global" if how == "default" else how
        with context_session(capturing), torch.cuda.graph(graph, capture_error_mode=mode):
            return x * 2

    def captures() -> None:
        nonlocal captured_graphs
        deadline = time.monotonic() + PATIENCE
        try:
            # A capture takes a millisecond, a move may take a hundred.
            while captured_graphs < 100 or len(mover.durations) < 3:
                assert time.monotonic() < deadline
                graph = torch.cuda.CUDAGraph()
                y = capture(graph)
                x.fill_(captured_graphs)
                graph.replay()
                assert y.cpu().eq(2 * captured_graphs).all()
                captured_graphs += 1
        finally:
            stop.set()

    def moves() -> None:
        while not stop.is_set():
            mover()

    start = time.perf_counter()
    at_once(captures, moves)
    seconds = time.perf_counter() - start
    print(f"\n{captured_graphs} captures in {seconds:.2f} s, {len(mover.durations)} moves")
    assert all(one.max().item() == 0 for one in moved)


# Graphs with matrix products share nothing -------------------------------------------------------


class Products:
    """A graph of products of few outputs and long sums, which need a workspace."""

    def __init__(self, name: str, seed: int) -> None:
        self.context = create_context(name, 512 * MB, qos=QoSPolicy.BEST_EFFORT)
        generator = torch.Generator("cuda").manual_seed(seed)
        shapes = [(256, 32768, 256), (64, 65536, 128), (512, 16384, 128)]
        with context_session(self.context):

            def normal(*shape: int) -> torch.Tensor:
                return torch.randn(shape, device="cuda", generator=generator).bfloat16()

            self.pairs = [(normal(m, k), normal(k, n)) for m, k, n in shapes]
            self.out = [torch.zeros(m, n, device="cuda") for m, _, n in shapes]
            self.run()
            self.right = [one.clone() for one in self.out]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        assert self.replays_right()

    def run(self) -> None:
        for (x, w), out in zip(self.pairs, self.out, strict=True):
            out.zero_()
            for _ in range(6):
                out.add_((x @ w).float())

    def replays_right(self) -> bool:
        with context_session(self.context):
            self.graph.replay()
        pairs = zip(self.out, self.right, strict=True)
        return all(bool(((a - b).abs().max() <= 0.01 * b.abs().max()).item()) for a, b in pairs)


@pytest.fixture
def products(cuda: None) -> Iterator[list[Products]]:
    made = [Products(name, seed) for seed, name in enumerate(("first", "second"))]
    yield made
    made.clear()
    gc.collect()


def test_graphs_with_products_replay_beside_each_other(products: list[Products]) -> None:
    results: list[bool] = []

    def replay(one: Products) -> None:
        results.extend(one.replays_right() for _ in range(500))

    at_once(*(lambda one=one: replay(one) for one in products))
    assert len(results) == 1000
    assert results.count(False) == 0


def test_graphs_with_products_replay_while_one_moves_and_once_it_is_gone(
    products: list[Products],
) -> None:
    first, second = products
    mover = Mover(first.context)
    results: list[bool] = []
    with beside(lambda: results.append(second.replays_right())):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            results.append(first.replays_right())  # its pages have changed
            mover()
    assert len(mover.durations) >= 3
    assert results.count(False) == 0
    context = first.context
    products.remove(first)
    del first, mover
    gc.collect()
    context.destroy()
    torch.cuda.empty_cache()
    other = create_context("other", GB)
    with context_session(other):
        filled = torch.full((800 * MB,), 255, dtype=torch.uint8, device="cuda")
    assert all(second.replays_right() for _ in range(20))
    assert filled.min().item() == 255
