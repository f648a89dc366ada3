"""A process for each server that ``oversubscribe`` compares, with an allocator of its own."""

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.latency import back_to_back
from benchmarks.oversubscribe_ways import SERVERS, Server
from benchmarks.oversubscribe_work import RATIOS, needed, weight_bytes
from benchmarks.timings import CUDA

Tokens = list[int]


@dataclass
class Served:
    """What came of requests: seconds of each, how many found their model, bytes that moved."""

    latencies: list[float] = field(default_factory=list)
    resident: int = 0
    moved: int = 0
    wrong: int = 0

    def add(self, other: "Served") -> None:
        """Add what came of more requests."""
        self.latencies += other.latencies
        self.resident += other.resident
        self.moved += other.moved
        self.wrong += other.wrong


class Process:
    """A process that has one server, from when it is made. Only one of them may serve at a time."""

    def __init__(self, server: str) -> None:
        # Forking saves the imports, but CUDA does not survive it.
        methods = multiprocessing.get_context("spawn" if CUDA else "forkserver")
        if not CUDA:
            methods.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(1, mp_context=methods)
        self._prepared: Future[list[Tokens]] = self._pool.submit(prepare, server)

    def tokens(self) -> list[Tokens]:
        """Wait until all models are made; what each of them answers. Raises what failed there."""
        return self._prepared.result()

    def serve(self, order: list[int], ahead: bool, seconds: float) -> Served:
        """See :func:`serve`. Raises what failed there."""
        return self._pool.submit(serve, order, ahead, seconds).result()

    def end(self) -> None:
        """End the process, and wait for that."""
        self._pool.shutdown()


@contextmanager
def processes(servers: list[str]) -> Iterator[dict[str, Process]]:
    """Have a process for each server until the block ends. They are prepared at the same time."""
    running = {server: Process(server) for server in servers}
    try:
        yield running
    finally:
        # At the same time, too: pages that were pinned take a while.
        with ThreadPoolExecutor(len(running)) as threads:
            list(threads.map(Process.end, running.values()))


# In the process ----------------------------------------------------------------------------------

_prepared: list[tuple[Server, list[Tokens]]] = []


def prepare(name: str) -> list[Tokens]:
    """Make the server and its models, and have each serve twice; the tokens of each.

    The first time a model is served, kernels are loaded, and moving it out may be slower.
    """
    # As many processes do this at the same time, more threads would only be in each other's way.
    torch.set_num_threads(1)
    weights = weight_bytes()
    server = SERVERS[name](weights)
    count = needed(max(RATIOS), weights)
    tokens = []
    for index in range(count):
        server.make(index)
        tokens.append(server.serve(index, None))
    if tokens != [server.serve(index, None) for index in range(count)]:
        raise RuntimeError("a model answers differently the second time")
    _prepared.append((server, tokens))
    # So that the collector has little to walk, and a long pause is not some request's latency.
    gc.collect()
    gc.freeze()
    return tokens


def serve(order: list[int], ahead: bool, seconds: float) -> Served:
    """Serve requests of the models in ``order``, none of them begun after ``seconds``.

    ``ahead``: the server is told the next request's model with each.
    """
    ((server, tokens),) = _prepared
    following = [*order[1:], None] if ahead else [None] * len(order)
    steps = zip(order, following, strict=True)
    result = Served()
    moved = server.moved_bytes()

    def request() -> None:
        index, after = next(steps)
        result.resident += server.is_resident(index)
        result.wrong += server.serve(index, after) != tokens[index]

    result.latencies = back_to_back(request, len(order), seconds)
    result.moved = server.moved_bytes() - moved
    return result
