"""What a session costs: entering and leaving on idle streams, and every await within."""

import asyncio
import contextlib
import contextvars
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import torch

import pygpukit_torch as pgk
from benchmarks.progress import track
from benchmarks.report import Report
from pygpukit_torch import GB, MB, context_session

LOOPS = 2_000  # of one timing


def run(quick: bool) -> Report:
    """Measure. ``quick`` runs fewer repetitions."""
    repetitions = 5 if quick else 31
    cuda = torch.cuda.is_available()
    pgk.initialize(device="cuda" if cuda else "cpu", total_vram=4 * GB)
    first, second = contexts = [pgk.create_context(name, 512 * MB) for name in ("a", "b")]
    report = Report(
        "session",
        "microseconds, median of all turns",
        ["what", "us", "us spread"],
    )
    timed = {**_entering(contexts[0], cuda), **_awaiting(contexts)}
    turns: dict[str, list[float]] = {name: [] for name in timed}
    for _ in track(range(repetitions), "session"):
        for name, measure in timed.items():
            turns[name].append(measure() * 1e6)
    turns["async with beside a growing context, the longest of 200"] = [
        _longest_entry_beside_growth(first, second, cuda) * 1e6 for _ in range(repetitions)
    ]
    report.rows = [_row(name, values) for name, values in turns.items()]
    for context in contexts:
        context.destroy()
    pgk.shutdown()
    return report


def _row(name: str, values: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"what": name, "us": median, "us spread": f"{low:.3g}-{high:.3g}"}


def _entering(context: pgk.ExecutionContext, cuda: bool) -> dict[str, Callable[[], float]]:
    def timed(make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            for _ in range(LOOPS):
                with make():
                    pass
            return (time.perf_counter() - start) / LOOPS

        return measure

    ordered, unordered = context_session(context), context_session(context, wait=False)
    ways: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "contextlib.nullcontext()": contextlib.nullcontext,
        "context_session(ctx)": partial(context_session, context),
        "the same session again": lambda: ordered,
        "context_session(ctx, wait=False)": partial(context_session, context, wait=False),
        "the same session again, wait=False": lambda: unordered,
    }
    if cuda:
        stream, pool = torch.cuda.Stream(), torch.cuda.MemPool()
        ways["torch.cuda.stream(stream)"] = partial(torch.cuda.stream, stream)
        ways["torch.cuda.use_mem_pool(pool)"] = partial(torch.cuda.use_mem_pool, pool)
    return {name: timed(make) for name, make in ways.items()}


def _awaiting(contexts: list[pgk.ExecutionContext]) -> dict[str, Callable[[], float]]:
    async def awaits() -> float:
        start = time.perf_counter()
        for _ in range(LOOPS):
            await asyncio.sleep(0)
        return (time.perf_counter() - start) / LOOPS

    async def beside() -> float:
        async with context_session(contexts[0]):
            return await asyncio.create_task(awaits(), context=contextvars.Context())

    async def within() -> float:
        async with context_session(contexts[0]):
            return await awaits()

    async def entering() -> float:
        async with context_session(contexts[0]):
            start = time.perf_counter()
            for _ in range(LOOPS):
                async with context_session(contexts[1]):
                    pass
            return (time.perf_counter() - start) / LOOPS

    async def entering_first() -> float:
        start = time.perf_counter()
        for _ in range(LOOPS):
            async with context_session(contexts[1]):
                pass
        return (time.perf_counter() - start) / LOOPS

    def timed(main: Callable[[], Awaitable[float]]) -> Callable[[], float]:
        async def call() -> float:
            return await main()

        return lambda: asyncio.run(call())

    return {
        "an await, no session on the loop": timed(awaits),
        "an await of a task without a session beside one with": timed(beside),
        "an await within a session": timed(within),
        "async with, first session of the loop": timed(entering_first),
        "async with, within another session": timed(entering),
    }


def _longest_entry_beside_growth(
    context: pgk.ExecutionContext, outer: pgk.ExecutionContext, cuda: bool
) -> float:
    """Another thread grows the same context by hundreds of pages, again and again."""
    over = threading.Event()

    def grow() -> None:
        device = "cuda" if cuda else "cpu"
        while not over.is_set():
            with context_session(context):
                torch.empty(400 * MB, dtype=torch.uint8, device=device)
            pgk.runtime.get_or_initialize().manager.trim()

    async def enter() -> float:
        longest = 0.0
        async with context_session(outer):  # so that entering is done in one step
            for _ in range(200):
                session = context_session(context)
                start = time.perf_counter()
                await session.__aenter__()
                longest = max(longest, time.perf_counter() - start)
                await session.__aexit__(None, None, None)
        return longest

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        return asyncio.run(enter())
    finally:
        over.set()
        thread.join()
