"""Whoever waits for an event of a producer waits while its pages move, too, so that the consumer
works on them where they stay: with torch, on the host device."""

import asyncio
import time

import torch

import pygpukit_torch as pgk
from pygpukit_torch import MB, ContextBusyError, context_session
from tests.turns import background, wait_until


class Moved:
    """A producer of 64 MiB of zeros that somebody evicts and restores as often as he can."""

    SECONDS = 1.5

    def __init__(self) -> None:
        self.producer = pgk.create_context("producer", 96 * MB)
        self.consumer = pgk.create_context("consumer", 32 * MB)
        with context_session(self.producer):
            self.numbers = torch.zeros(64 * MB // 4, dtype=torch.int32)
        self.count = 0
        self.moves = 0
        self.end = time.monotonic() + self.SECONDS
        self.mover = background(self._move)
        wait_until(lambda: self.moves > 0)

    def _move(self) -> None:
        while time.monotonic() < self.end + 0.2:
            try:
                self.producer.evict()
                self.moves += 1
                self.producer.restore()
            except (ContextBusyError, torch.OutOfMemoryError):
                time.sleep(0.0005)

    def update(self) -> None:
        for _ in range(5):
            self.numbers.add_(1)
            self.count += 1

    def check(self) -> None:
        self.mover.result(30)
        assert self.count > 0
        assert self.moves > 1
        assert self.numbers.eq(self.count).all()


def test_wait_event_waits_while_the_producer_moves(scheduler: None) -> None:
    moved = Moved()
    while time.monotonic() < moved.end:
        with context_session(moved.producer):
            event = pgk.record_event(moved.producer)
        time.sleep(0.003)  # the mover begins
        with context_session(moved.consumer):
            pgk.wait_event(moved.consumer, event)
            moved.update()
    moved.check()


def test_wait_event_in_a_task_is_awaited_while_the_producer_moves(scheduler: None) -> None:
    moved = Moved()
    steps = 0

    async def ticks() -> None:
        nonlocal steps
        while True:
            await asyncio.sleep(0)
            steps += 1

    async def main() -> None:
        ticking = asyncio.create_task(ticks())
        while time.monotonic() < moved.end:
            async with context_session(moved.producer):
                event = pgk.record_event(moved.producer)
            await asyncio.sleep(0.003)
            async with context_session(moved.consumer):
                await pgk.wait_event(moved.consumer, event)
                moved.update()
        ticking.cancel()

    asyncio.run(main())
    assert steps > 0
    moved.check()
