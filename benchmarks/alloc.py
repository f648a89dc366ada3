"""Allocate + free that hits, inside a session, against the allocator that torch has without us.

Both sides are called through torch's allocator interface, from C++, in the same run and in turns:
on CUDA where there is a GPU, else on the host device. Threads have a context each.
"""

import os
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

import pygpukit_torch as pgk
from benchmarks.progress import track
from benchmarks.report import Report
from pygpukit_torch import GB, KB, MB

SIZES = [512, 4 * KB, 64 * KB, 1 * MB, 8 * MB, 64 * MB]
# On one thread, where there is so much memory: both sides keep what they have got.
LARGE_SIZES = [512 * MB, 8 * GB]
LIVE = 4  # blocks; 2 of the large ones

Timer = Callable[[bool, int, int, int], float]


def run(quick: bool) -> Report:
    """Measure. ``quick`` runs fewer repetitions."""
    seconds, repetitions = (0.005, 5) if quick else (0.03, 15)
    cuda = torch.cuda.is_available()
    loop = load_loop()
    if cuda:
        torch.cuda.init()
    loop.remember_stock(cuda)
    pgk.initialize(device="cuda" if cuda else "cpu", total_vram=20 * GB if cuda else 4 * GB)
    cores = len(os.sched_getaffinity(0))
    threads = [count for count in (1, 2, 4, 8) if count <= max(2, cores)]
    contexts = [pgk.create_context(f"bench-{i}", 1 * GB) for i in range(threads[-1])]
    cases = [(size, contexts[:count]) for size in SIZES for count in threads]
    if cuda:
        large = pgk.create_context("large", 18 * GB)
        cases += [(size, [large]) for size in LARGE_SIZES]
    report = Report(
        "alloc",
        "ns a pair of allocate + free, median",
        [
            "bytes",
            "threads",
            "stock",
            "session",
            "stock spread",
            "session spread",
            "ratio",
            "stock M/s",
            "session M/s",
        ],
    )

    def timed(timer: Timer, size: int) -> float:
        """Nanoseconds a pair, from a run of about ``seconds`` after a short warm-up."""
        live = 2 if size in LARGE_SIZES else LIVE
        estimate = timer(cuda, size, 100, live)
        return timer(cuda, size, max(100, int(seconds * 1e9 / estimate)), live)

    def row(contexts: list[pgk.ExecutionContext], size: int) -> dict[str, object]:
        def in_session(context: pgk.ExecutionContext) -> float:
            with pgk.context_session(context):
                return timed(loop.time_current, size)

        stock: list[float] = []
        session: list[float] = []
        for _ in range(repetitions):
            stock.append(_on_threads(contexts, lambda _: timed(loop.time_stock, size)))
            session.append(_on_threads(contexts, in_session))
        medians = statistics.median(stock), statistics.median(session)
        return {
            "bytes": size,
            "threads": len(contexts),
            "stock": medians[0],
            "session": medians[1],
            "stock spread": _quartiles(stock),
            "session spread": _quartiles(session),
            "ratio": medians[1] / medians[0],
            # Of all threads together.
            "stock M/s": len(contexts) * 1e3 / medians[0],
            "session M/s": len(contexts) * 1e3 / medians[1],
        }

    try:
        for size, of in track(cases, "alloc"):
            report.rows.append(row(of, size))
    finally:
        for context in pgk.list_contexts():
            context.destroy()
        pgk.shutdown()
    return report


def load_loop() -> Any:
    """Compile and load ``alloc_loop.cpp``."""
    return load(
        "pygpukit_alloc_loop",
        [str(Path(__file__).with_name("alloc_loop.cpp"))],
        extra_cflags=["-O2", "-std=c++20"],
    )


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
