"""Allocate + free that hits, inside a session, against the allocator that torch has without us.

``beside a MemPool`` and ``beside a capture`` are the same threads while one more, in a context of
its own, allocates from a private pool of torch's.

Both sides are called through torch's allocator interface, from C++, in the same run and in turns:
on CUDA where there is a GPU, else on the host device. Threads have a context each. ``stock`` is
torch's own allocator in our process, without us. Peers have processes of their own, and take turns
with both; they are asked for one thread and for the most.
"""

import os
import statistics
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import pygpukit_torch as pgk
from benchmarks.alloc_beside import a_capture, a_mem_pool, beside
from benchmarks.alloc_pairs import load_loop, on_threads, pair_ns
from benchmarks.peers import NATIVE, OURS, Peer, PeerError, names, started
from benchmarks.progress import track
from benchmarks.report import Report
from benchmarks.timings import CUDA, DEVICE
from pygpukit_torch import GB, KB, MB

SIZES = [512, 4 * KB, 64 * KB, 1 * MB, 8 * MB, 64 * MB]
BY_THREADS = 64 * KB  # on all numbers of threads; the others on one and the most
# On one thread, where there is so much memory: all sides keep what they have got.
LARGE_SIZES = [512 * MB, 8 * GB]
PEERS_EVERY = 3  # turns
BESIDE = {"beside a MemPool": a_mem_pool, "beside a capture": a_capture}
COLUMNS = [
    "bytes",
    "threads",
    "stock",
    "session",
    "stock spread",
    "session spread",
    "ratio",
    "stock M/s",
    "session M/s",
]


def run(quick: bool) -> Report:
    """Measure. ``quick`` runs fewer repetitions, and no peers."""
    seconds, repetitions = (0.005, 5) if quick else (0.03, 9)
    loop = load_loop()
    loop.remember_stock(CUDA)
    pgk.initialize(device=DEVICE, total_vram=20 * GB if CUDA else 4 * GB)
    threads = [count for count in (1, 2, 4, 8) if count <= max(2, len(os.sched_getaffinity(0)))]
    contexts = [pgk.create_context(f"bench-{i}", 1 * GB) for i in range(threads[-1])]
    cases = [
        (size, contexts[:count])
        for size in SIZES
        for count in threads
        if count in (1, threads[-1]) or size == BY_THREADS
    ]
    if CUDA:
        large = pgk.create_context("large", 18 * GB)
        cases += [(size, [large]) for size in LARGE_SIZES]
    compared = [] if quick or not CUDA else [name for name in names() if name not in (OURS, NATIVE)]
    columns = [*COLUMNS, *(BESIDE if CUDA else ()), *compared]
    report = Report("alloc", "ns a pair of allocate + free, median", columns)
    other = pgk.create_context("pools", 256 * MB)

    def row(
        processes: dict[str, Peer], size: int, contexts: list[pgk.ExecutionContext]
    ) -> dict[str, Any]:
        times: dict[str, list[float]] = {"stock": [], "session": []}
        besides = BESIDE if CUDA and size == BY_THREADS and len(contexts) == threads[-1] else {}
        failures: dict[str, str] = {}
        sessions = [partial(pgk.context_session, context) for context in contexts]
        outside = [nullcontext] * len(contexts)
        for turn in range(repetitions):
            stock = on_threads(outside, partial(pair_ns, loop.time_stock, size, seconds))
            session = on_threads(sessions, partial(pair_ns, loop.time_current, size, seconds))
            times["stock"].append(stock)
            times["session"].append(session)
            for name, within in besides.items():
                with beside(within, other):
                    time = on_threads(sessions, partial(pair_ns, loop.time_current, size, seconds))
                times.setdefault(name, []).append(time)
            for name, peer in processes.items() if turn % PEERS_EVERY == 0 else ():
                try:
                    time = peer.ask([size, len(contexts), seconds])
                    times.setdefault(name, []).append(time)
                except PeerError as error:
                    failures[name] = str(error)
        medians = {name: statistics.median(values) for name, values in times.items()}
        return {
            "bytes": size,
            "threads": len(contexts),
            **dict.fromkeys([*(BESIDE if CUDA else ()), *compared], ""),
            **medians,
            **failures,
            "stock spread": _quartiles(times["stock"]),
            "session spread": _quartiles(times["session"]),
            "ratio": medians["session"] / medians["stock"],
            # Of all threads together.
            "stock M/s": len(contexts) * 1e3 / medians["stock"],
            "session M/s": len(contexts) * 1e3 / medians["session"],
        }

    with ExitStack() as stack:
        stack.callback(pgk.shutdown)
        for context in pgk.list_contexts():
            stack.callback(context.destroy)
        processes = {
            name: stack.enter_context(started(name, "benchmarks.alloc_pairs")) for name in compared
        }
        for process in processes.values():
            with suppress(PeerError):  # every row of it will say so
                process.ask([SIZES[0], 1, seconds])
        for size, of in track(cases, "alloc"):
            asked = processes if size in SIZES and len(of) in (1, threads[-1]) else {}
            report.rows.append(row(asked, size, of))
    return report


def _quartiles(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.0f}-{high:.0f}"
