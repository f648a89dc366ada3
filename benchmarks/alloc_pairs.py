"""Timing of allocate + free in C++, for the story ``alloc`` and its peers in their processes."""

import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

from benchmarks import peers
from benchmarks.timings import CUDA
from pygpukit_torch import GB

LIVE = 4  # blocks at any time
FEW_LIVE = 2  # of more than a gibibyte


def load_loop() -> Any:
    """Compile and load ``alloc_loop.cpp``, once CUDA is initialized."""
    if CUDA:
        torch.cuda.init()
    return load(
        "pygpukit_alloc_loop",
        [str(Path(__file__).with_name("alloc_loop.cpp"))],
        extra_cflags=["-O2", "-std=c++20"],
    )


def pair_ns(timer: Callable[[bool, int, int, int], float], size: int, seconds: float) -> float:
    """Nanoseconds a pair, from a run of about ``seconds`` after a short warm-up."""
    live = FEW_LIVE if size > GB else LIVE
    estimate = timer(CUDA, size, 100, live)
    return timer(CUDA, size, max(100, int(seconds * 1e9 / estimate)), live)


def on_threads(
    borders: Sequence[Callable[[], AbstractContextManager[object]]], work: Callable[[], float]
) -> float:
    """Mean over the threads of what ``work`` returns, each within its border."""
    times: list[float] = []
    barrier = threading.Barrier(len(borders))

    def body(border: Callable[[], AbstractContextManager[object]]) -> None:
        with border():
            barrier.wait()
            times.append(work())

    if len(borders) == 1:
        body(borders[0])
        return times[0]
    workers = [threading.Thread(target=body, args=(border,)) for border in borders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statistics.mean(times)


def _prepared(name: str) -> Callable[[list[Any]], float]:
    peers.install(name)
    loop = load_loop()
    loop.remember_stock(CUDA)

    def answer(question: list[Any]) -> float:
        size, threads, seconds = question
        return on_threads([nullcontext] * threads, lambda: pair_ns(loop.time_stock, size, seconds))

    return answer


if __name__ == "__main__":
    peers.serve(_prepared)
