"""Allocate + free that hits, inside a session, against torch's stock CPU allocator.

Both sides are called through torch's allocator interface, from C++, in the same run and in turns.
Threads have a context each.
"""

import statistics
import threading
from collections.abc import Callable
from pathlib import Path

from torch.utils.cpp_extension import load

import pygpukit_torch as pgk
from benchmarks.report import Report
from pygpukit_torch import GB, KB, MB

SIZES = [512, 4 * KB, 64 * KB, 1 * MB, 8 * MB, 64 * MB]
THREADS = [1, 2]
LIVE = 4

Timer = Callable[[int, int, int], float]


def run(quick: bool) -> Report:
    """Measure. ``quick`` runs fewer repetitions."""
    seconds, repetitions = (0.005, 5) if quick else (0.03, 15)
    loop = load(
        "pygpukit_alloc_loop",
        [str(Path(__file__).with_name("alloc_loop.cpp"))],
        extra_cflags=["-O2", "-std=c++20"],
    )
    pgk.initialize(device="cpu", total_vram=4 * GB)
    contexts = [pgk.create_context(f"bench-{i}", 1 * GB) for i in range(max(THREADS))]
    report = Report(
        "alloc",
        "ns a pair of allocate + free, median",
        ["bytes", "threads", "stock", "session", "stock spread", "session spread", "ratio"],
    )
    try:
        for size in SIZES:
            for threads in THREADS:
                report.rows.append(_row(loop, contexts[:threads], size, seconds, repetitions))
    finally:
        for context in contexts:
            context.destroy()
        pgk.shutdown()
    return report


def _row(
    loop: object,
    contexts: list[pgk.ExecutionContext],
    size: int,
    seconds: float,
    repetitions: int,
) -> dict[str, object]:
    stock_timer: Timer = loop.time_stock  # type: ignore[attr-defined]
    session_timer: Timer = loop.time_current  # type: ignore[attr-defined]

    def in_session(context: pgk.ExecutionContext) -> float:
        with pgk.context_session(context):
            return _timed(session_timer, size, seconds)

    stock: list[float] = []
    session: list[float] = []
    for _ in range(repetitions):
        stock.append(_on_threads(contexts, lambda _: _timed(stock_timer, size, seconds)))
        session.append(_on_threads(contexts, in_session))
    return {
        "bytes": size,
        "threads": len(contexts),
        "stock": statistics.median(stock),
        "session": statistics.median(session),
        "stock spread": _quartiles(stock),
        "session spread": _quartiles(session),
        "ratio": statistics.median(session) / statistics.median(stock),
    }


def _timed(timer: Timer, size: int, seconds: float) -> float:
    """Nanoseconds a pair, from a run of about ``seconds`` after a short warm-up."""
    estimate = timer(size, 100, LIVE)
    return timer(size, max(100, int(seconds * 1e9 / estimate)), LIVE)


def _on_threads(
    contexts: list[pgk.ExecutionContext], work: Callable[[pgk.ExecutionContext], float]
) -> float:
    """Mean over the threads of the time that one pair took on its thread."""
    if len(contexts) == 1:
        return work(contexts[0])
    times: list[float] = []
    barrier = threading.Barrier(len(contexts))

    def body(context: pgk.ExecutionContext) -> None:
        barrier.wait()
        times.append(work(context))

    workers = [threading.Thread(target=body, args=(context,)) for context in contexts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statistics.mean(times)


def _quartiles(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.0f}-{high:.0f}"
