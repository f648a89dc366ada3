"""Contexts that yield on a GPU: held back between operators, and in nobody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from pygpukit_torch import (
    GB,
    MB,
    ExecutionContext,
    QoSPolicy,
    context_session,
    create_context,
)
from tests.gpu.beside import beside

pytestmark = pytest.mark.usefixtures("check_invariants")

A_WHILE = 0.3
FEW = 30


@pytest.fixture
def guaranteed(cuda: None) -> ExecutionContext:
    return create_context("guaranteed", GB, qos=QoSPolicy.GUARANTEED)


@pytest.fixture
def yielding(cuda: None) -> ExecutionContext:
    return create_context("yielding", 2 * GB, qos=QoSPolicy.BEST_EFFORT, yields=True)


class Counted:
    """Work that counts itself."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.count = 0

    def __call__(self) -> None:
        self.work()
        self.count += 1

    def in_a_while(self) -> int:
        before = self.count
        time.sleep(A_WHILE)
        return self.count - before


@contextmanager
def at_work(context: ExecutionContext) -> Iterator[None]:
    """One session in which kernels run all the time."""
    with context_session(context):
        x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
        y = torch.empty_like(x)
    started = threading.Event()
    events: list[torch.cuda.Event] = []

    def work() -> None:
        torch.mm(x, x, out=y)
        events.append(torch.cuda.Event())
        events[-1].record()
        if len(events) > 64:
            events.pop(0).synchronize()
            started.set()

    def session() -> None:
        with context_session(context):
            while not stop.is_set():
                work()

    stop = threading.Event()
    thread = threading.Thread(target=session, daemon=True)
    thread.start()
    try:
        assert started.wait(60)
        yield
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def matmul(context: ExecutionContext) -> Callable[[], None]:
    with context_session(context):
        x = torch.randn(512, 512, device="cuda")

    def work() -> None:
        with context_session(context):
            torch.mm(x, x)

    return work


def train(context: ExecutionContext) -> Callable[[], None]:
    with context_session(context):
        model = torch.nn.Linear(256, 256, device="cuda")
        x = torch.randn(64, 256, device="cuda")

    def work() -> None:
        with context_session(context):
            loss = model(x).square().mean()
            loss.backward()

    return work


def replay(context: ExecutionContext) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with context_session(context):
        x = torch.randn(512, 512, device="cuda")
        x @ x
        with torch.cuda.graph(graph):
            x @ x

    def work() -> None:
        with context_session(context):
            graph.replay()

    return work


@pytest.mark.parametrize("kind", [matmul, train, replay])
def test_work_waits_for_guaranteed_work(
    guaranteed: ExecutionContext,
    yielding: ExecutionContext,
    kind: Callable[[ExecutionContext], Callable[[], None]],
) -> None:
    work = kind(yielding)
    for _ in range(3):
        work()
    counted = Counted(work)
    with beside(counted):
        before = counted.in_a_while()
        with at_work(guaranteed):
            held = counted.in_a_while()
        after = counted.in_a_while()
    assert before > 5 * held < after, (before, held, after)


def test_an_open_session_without_work_holds_nobody_back(
    guaranteed: ExecutionContext, yielding: ExecutionContext
) -> None:
    counted = Counted(matmul(yielding))
    opened, leave = threading.Event(), threading.Event()

    def session() -> None:
        with context_session(guaranteed):
            opened.set()
            leave.wait(60)

    thread = threading.Thread(target=session, daemon=True)
    thread.start()
    try:
        assert opened.wait(60)
        with beside(counted):
            assert counted.in_a_while() > FEW
    finally:
        leave.set()
        thread.join(60)


def test_others_get_on_while_somebody_is_held_back(
    guaranteed: ExecutionContext, yielding: ExecutionContext
) -> None:
    """Cold kernels, frees that wait for the device, native out of memory: none hangs."""
    source = 'extern "C" __global__ void add%d(float* x) { x[threadIdx.x] += %d; }'
    other = create_context("other", GB)
    counted = Counted(matmul(yielding))
    with at_work(guaranteed), beside(counted):
        begin = counted.count
        for i in range(40):
            kernel = torch.cuda._compile_kernel(source % (i, i), f"add{i}")
            with context_session(other):
                x = torch.zeros(32, device="cuda")
                kernel((1, 1, 1), (32, 1, 1), (x,))
            assert int(x.sum()) == 32 * i
            y = torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
            del y
            torch.cuda.empty_cache()
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
        while counted.count == begin:
            time.sleep(0.01)


def test_little_is_submitted_ahead(yielding: ExecutionContext) -> None:
    with context_session(yielding):
        x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        y = torch.empty_like(x)
        events: list[torch.cuda.Event] = []
        for _ in range(40):
            torch.mm(x, x, out=y)
            events.append(torch.cuda.Event())
            events[-1].record()
            assert sum(not event.query() for event in events) <= 4


def test_graphs_are_captured_with_their_contexts_priority(cuda: None) -> None:
    for tier, priority in (
        (QoSPolicy.GUARANTEED, -5),
        (QoSPolicy.BURSTABLE, -2),
        (QoSPolicy.BEST_EFFORT, 0),
    ):
        context = create_context(tier.value, 256 * MB, qos=tier)
        graph = torch.cuda.CUDAGraph()
        with context_session(context):
            x = torch.zeros(8, device="cuda")
            with torch.cuda.graph(graph):
                assert torch.cuda.current_stream().priority == priority
                x.add_(1)
            graph.replay()
        assert x.tolist() == [1] * 8
