"""Several models at work at once, each on a thread of its own or all on one event loop."""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from benchmarks.beside import Border, Operation, completions, repeated
from pygpukit_torch import ExecutionContext, context_session

DECODE, ENCODE, SECOND = "decode", "encode", "second decode"
EAGER, GRAPH = "eager", "graphs"
THREADS, ASYNCIO = "threads", "asyncio"


@dataclass(frozen=True)
class Model:
    """A model and where it works. ``submits`` has what submits its forward pass, by the way."""

    border: Border
    submits: dict[str, Callable[[], object]]
    context: ExecutionContext | None = None


@dataclass(frozen=True)
class Window:
    """What several models did in the same time.

    Attributes:
        rates: forward passes a second, of each.
        off_cpu: the part of the time in which its thread was on no CPU; nothing on an event loop.
    """

    rates: list[float]
    off_cpu: list[float]


def captured(
    submit: Callable[[], object], capture_on: torch.cuda.Stream | None
) -> torch.cuda.CUDAGraph:
    """Return it as a graph; see ``qos_ways.Sides`` for the stream."""
    submit()  # loads what cannot be loaded during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture_on):
        submit()
    return graph


def on_threads(models: list[Model], way: str, seconds: float) -> Window:
    """Let each model work on a thread of its own, one pass after the other."""
    with ExitStack() as stack:
        threads = [
            stack.enter_context(repeated(model.border, Operation(model.submits[way])))
            for model in models
        ]
        begin, before = time.perf_counter(), [thread.cpu_seconds() for thread in threads]
        time.sleep(seconds)
        end, after = time.perf_counter(), [thread.cpu_seconds() for thread in threads]
    wall = end - begin
    return Window(
        [thread.completed(begin, end) / wall for thread in threads],
        # The clocks are not read in the same moment.
        [max(0.0, 1 - (last - first) / wall) for first, last in zip(before, after, strict=True)],
    )


def on_one_loop(models: list[Model], way: str, seconds: float) -> Window:
    """Let each model work in a task of one event loop, one pass after the other."""
    ends: list[list[float]] = [[] for _ in models]
    begins: list[float] = []

    async def work(model: Model, ends: list[float], steady: asyncio.Barrier) -> None:
        assert model.context
        async with context_session(model.context) as session:
            model.submits[way]()
            await session.synchronize()
            await steady.wait()
            begins.append(time.perf_counter())
            while time.perf_counter() < begins[0] + seconds:
                model.submits[way]()
                await session.synchronize()
                ends.append(time.perf_counter())
                await asyncio.sleep(0)  # for what is done already nobody waits

    async def main() -> None:
        steady = asyncio.Barrier(len(models))
        await asyncio.gather(
            *(work(model, each, steady) for model, each in zip(models, ends, strict=True))
        )

    asyncio.run(main())
    return Window([completions(each, begins[0] + seconds) / seconds for each in ends], [])


def lost_to_waiting(kept: list[float], off_cpu: list[float], off_cpu_alone: list[float]) -> float:
    """Return how much more models would keep at most if their threads were on CPUs as alone.

    ``kept`` is the part of its rate alone that each has. No model can lose more by waiting than it
    lost.
    """
    return sum(
        min(max(0.0, 1 - part), max(0.0, beside - alone))
        for part, beside, alone in zip(kept, off_cpu, off_cpu_alone, strict=True)
    )
