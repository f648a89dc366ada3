"""Threads of torch's private pools, beside those that the story ``alloc`` times."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from pygpukit_torch import ExecutionContext, context_session


def a_mem_pool() -> AbstractContextManager[object]:
    """All that the calling thread allocates comes from a MemPool of its own."""
    return torch.cuda.use_mem_pool(torch.cuda.MemPool())


@contextmanager
def a_capture() -> Iterator[None]:
    """The calling thread captures a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        yield


@contextmanager
def beside(
    within: Callable[[], AbstractContextManager[object]], context: ExecutionContext
) -> Iterator[None]:
    """Another thread, in a session of ``context`` and ``within``, allocates every millisecond."""
    begun, stop = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with context_session(context), within():
                begun.set()
                while not stop.wait(0.001):
                    torch.empty(1000, device="cuda")
        except BaseException as error:
            failures.append(error)
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
