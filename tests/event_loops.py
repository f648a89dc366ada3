"""The event loops that sessions are tested on, all of this Python's."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

R = TypeVar("R")
Run = Callable[[Coroutine[Any, Any, R]], R]


def _run_in_debug_mode(main: Coroutine[Any, Any, R]) -> R:
    return asyncio.run(main, debug=True)


def _run_eagerly(main: Coroutine[Any, Any, R]) -> R:
    def make_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009  # new in 3.12
        return loop

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(main)


LOOPS: dict[str, Run[Any]] = {
    "asyncio": asyncio.run,
    "debug": _run_in_debug_mode,
    "uvloop": uvloop.run,
}
if sys.version_info >= (3, 12):
    LOOPS["eager"] = _run_eagerly
