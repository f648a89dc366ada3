"""Contexts that yield: their operators wait while guaranteed contexts work."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    MB,
    ExecutionContext,
    QoSPolicy,
    context_session,
    create_context,
    native,
)

# Nothing here depends on how long something takes, but that a thread which is not held back does
# more in a quarter of a second than one which may do something every tenth.
A_WHILE = 0.25
FEW = 20


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    pgk.shutdown()
    pgk.initialize(device="cpu", total_vram=64 * MB)
    yield
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()


@pytest.fixture
def guaranteed() -> ExecutionContext:
    return create_context("guaranteed", 8 * MB, qos=QoSPolicy.GUARANTEED)


@pytest.fixture
def yielding() -> ExecutionContext:
    return create_context("yielding", 8 * MB, qos=QoSPolicy.BEST_EFFORT, yields=True)


class Repeated:
    """A thread that adds one to a tensor, in a session or in none, and counts."""

    def __init__(self, context: ExecutionContext, backward: bool = False) -> None:
        self.context = context
        self.count = 0
        self.started = threading.Event()
        self.stop = threading.Event()
        self.work: Callable[[torch.Tensor], object] = self.train if backward else self.add
        self.thread = threading.Thread(target=self.run, daemon=True)

    @staticmethod
    def add(x: torch.Tensor) -> object:
        return x.add_(1)

    @staticmethod
    def train(x: torch.Tensor) -> object:
        (x.detach().requires_grad_() * 2).sum().backward()
        return None

    def run(self) -> None:
        with context_session(self.context):
            x = torch.zeros(16)
            self.started.set()
            while not self.stop.is_set():
                self.work(x)
                self.count += 1

    def __enter__(self) -> "Repeated":
        self.thread.start()
        assert self.started.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def counted(self) -> int:
        before = self.count
        time.sleep(A_WHILE)
        return self.count - before


@pytest.mark.parametrize("backward", [False, True])
def test_operators_wait_for_guaranteed_sessions(
    guaranteed: ExecutionContext, yielding: ExecutionContext, backward: bool
) -> None:
    with Repeated(yielding, backward) as repeated:
        assert repeated.counted() > FEW
        with context_session(guaranteed):
            torch.ones(4)
            assert repeated.counted() <= FEW
        assert repeated.counted() > FEW


def test_nobody_is_held_back_for_ever(
    guaranteed: ExecutionContext, yielding: ExecutionContext
) -> None:
    # Whoever waits for who is held back, within the session, gets on.
    with context_session(guaranteed), Repeated(yielding) as repeated:
        while repeated.count < 2:
            time.sleep(0.01)


def test_others_are_not_held_back(guaranteed: ExecutionContext) -> None:
    other = create_context("other", 8 * MB, qos=QoSPolicy.BEST_EFFORT)
    with Repeated(other) as repeated, context_session(guaranteed):
        assert repeated.counted() > FEW


def test_lower_tiers_hold_nobody_back(yielding: ExecutionContext) -> None:
    other = create_context("other", 8 * MB)
    with Repeated(yielding) as repeated, context_session(other):
        assert repeated.counted() > FEW


def test_what_a_thread_is_in_decides(
    guaranteed: ExecutionContext, yielding: ExecutionContext
) -> None:
    """Inside of a nested session, and after it, other rules hold."""
    other = create_context("other", 8 * MB)
    x = torch.zeros(16)

    def add() -> int:
        end = time.monotonic() + A_WHILE
        count = 0
        while time.monotonic() < end:
            x.add_(1)
            count += 1
        return count

    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with context_session(guaranteed):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert entered.wait(30)
        assert add() > FEW
        with context_session(yielding):
            assert add() <= FEW
            with context_session(other):
                assert add() > FEW
            assert add() <= FEW
        assert add() > FEW
    finally:
        leave.set()
        thread.join(30)


def test_tasks_are_not_held_back(guaranteed: ExecutionContext, yielding: ExecutionContext) -> None:
    """It would hold up the loop, and with it the very task that it waits for."""

    async def background(stop: asyncio.Event) -> int:
        count = 0
        async with context_session(yielding):
            x = torch.zeros(16)
            while not stop.is_set():
                x.add_(1)
                count += 1
                await asyncio.sleep(0)
        return count

    async def main() -> int:
        stop = asyncio.Event()
        async with context_session(guaranteed):
            task = asyncio.create_task(background(stop))
            await asyncio.sleep(A_WHILE)
            stop.set()
            return await task

    assert asyncio.run(main()) > FEW


def test_little_is_submitted_ahead() -> None:
    """One operation at a time, at first: the thread waits for what the device has not done."""
    device = native.HostDevice(64 * MB)
    manager = native.Manager(device, native.host_streams())
    context = manager.create_context("c", 8 * MB, 0, native.Tier.best_effort, yields=True)
    passed = threading.Semaphore(0)

    def work() -> None:
        session = native.Session(context, ordered=False)
        session.enter()
        for _ in range(3):
            native.pass_gate()
            passed.release()
        session.exit()

    device.hold(context.stream)
    device.record(context.stream)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert not passed.acquire(timeout=0.1), "the stream has work that is not done"
        device.let_go(context.stream)
        for _ in range(3):
            assert passed.acquire(timeout=30)
    finally:
        device.let_go(context.stream)
        thread.join(30)
    assert not thread.is_alive()


def test_the_argument_is_checked() -> None:
    with pytest.raises(TypeError, match="yields must be a bool, got int 1"):
        create_context("c", 8 * MB, yields=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'c': a guaranteed context yields to nobody"):
        create_context("c", 8 * MB, qos=QoSPolicy.GUARANTEED, yields=True)
    assert create_context("c", 8 * MB, yields=True).yields
    assert not create_context("d", 8 * MB).yields
