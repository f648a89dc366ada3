"""Helpers of the tests of who is let in when: threads that cannot hang a test, and waits."""

import _thread
import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import pygpukit_torch as pgk
from pygpukit_torch import context_session, native

R = TypeVar("R")
PATIENCE = 30.0  # seconds; only a test that fails takes as long


def background(fn: Callable[..., R], *args: Any) -> "Future[R]":
    """Call ``fn`` in a daemon thread of its own, which inherits no session."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(fn(*args))
        except BaseException as error:
            future.set_exception(error)

    _thread.start_new_thread(run, ())
    return future


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.001)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.001)


def waiting(context: pgk.ExecutionContext) -> int:
    """How many sessions of the context wait for their turn."""
    return next(c.waiting for c in pgk.stats().contexts if c.name == context.name)


def share_gate(limit: int, *contexts: pgk.ExecutionContext) -> native.SessionGate:
    """One limit for all of them."""
    gate = native.SessionGate("partition 'p'", limit)
    for context in contexts:
        context._native.set_partition_gate(gate)
    return gate


class Occupant:
    """A thread that is in a session of a context until it is told to leave."""

    def __init__(self, context: pgk.ExecutionContext, **options: Any) -> None:
        self._leave = threading.Event()
        self._entered = threading.Event()
        self._session = context_session(context, **options)
        self.thread = background(self._run)

    def _run(self) -> None:
        with self._session:
            self._entered.set()
            self._leave.wait(PATIENCE)

    @property
    def is_in(self) -> bool:
        return self._entered.is_set()

    def enter(self) -> "Occupant":
        """Wait until it is in."""
        wait_until(lambda: self.is_in or self.thread.done())
        assert self.is_in, self.thread.exception()
        return self

    def leave(self) -> None:
        """Have it leave, and wait until it has."""
        self._leave.set()
        self.thread.result(PATIENCE)

    def __enter__(self) -> "Occupant":
        return self.enter()

    def __exit__(self, *error: object) -> None:
        self.leave()


def is_free(context: pgk.ExecutionContext) -> bool:
    """Whether another session can be entered now, at once."""

    def attempt() -> bool:
        try:
            with context_session(context, timeout=0):
                return True
        except pgk.SessionTimeoutError:
            return False

    return background(attempt).result(PATIENCE)
