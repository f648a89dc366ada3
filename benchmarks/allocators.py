"""The allocators of the fragmentation story: what each reserves for a trace, in its process."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.peers import OURS, PeerError
from benchmarks.timings import CUDA
from pygpukit_torch import MB, native
from pygpukit_torch.trace import Allocator, ContextMemory, TorchMemory, Trace

Figures = dict[str, int | str]


def replayed(name: str, folder: Path) -> Figures:
    """Return what ``name`` reserved at most for every trace, in bytes, or texts of what failed."""
    figures: Figures = {}
    with peers.started(name, "benchmarks.allocators") as peer:
        for path in sorted(folder.iterdir()):
            try:
                figures[path.stem] = peer.ask(str(path))
            except PeerError as error:  # the others are still of interest
                figures[path.stem] = str(error)
    return figures


def _ours(trace: Trace) -> Allocator:
    # A generous budget, as one would give it: the pages are of the size that comes with it.
    budget = -(-2 * trace.peak_live_bytes // (64 * MB)) * 64 * MB
    device = native.CudaDevice() if CUDA else native.HostDevice(budget)
    return ContextMemory(device, budget)


# RMM --------------------------------------------------------------------------------------------


class _RmmMemory(TorchMemory):
    """An RMM resource behind torch's interface, through which it has no figures to ask or reset."""

    def __init__(self, resource: Any, reserved: Callable[[], int]) -> None:
        self._streams = [torch.cuda.current_stream()]
        import_module("rmm").mr.set_current_device_resource(resource)
        self._reserved = reserved

    def peak_reserved_bytes(self) -> int:
        return self._reserved()


def _pool(trace: Trace) -> Allocator:
    mr = import_module("rmm").mr
    upstream = mr.StatisticsResourceAdaptor(mr.CudaMemoryResource())
    pool = mr.PoolMemoryResource(upstream, initial_pool_size=0)
    return _RmmMemory(pool, lambda: upstream.allocation_counts.peak_bytes)


def _async(trace: Trace) -> Allocator:
    runtime = import_module("cuda.bindings.runtime")
    attributes = runtime.cudaMemPoolAttr

    def checked(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise RuntimeError(f"the CUDA runtime said {result[0]!r}")
        return result[-1]

    pool = checked(runtime.cudaDeviceGetDefaultMemPool(0))
    high = attributes.cudaMemPoolAttrReservedMemHigh
    cuuint64 = import_module("cuda.bindings.driver").cuuint64_t
    # As RMM does: nothing is released in between.
    checked(runtime.cudaMemPoolTrimTo(pool, 0))
    checked(
        runtime.cudaMemPoolSetAttribute(
            pool, attributes.cudaMemPoolAttrReleaseThreshold, cuuint64(2**63)
        )
    )
    checked(runtime.cudaMemPoolSetAttribute(pool, high, cuuint64(0)))
    resource = import_module("rmm").mr.CudaAsyncViewMemoryResource(pool)
    return _RmmMemory(resource, lambda: int(checked(runtime.cudaMemPoolGetAttribute(pool, high))))


def _smallest_arena(trace: Trace) -> int:
    """Return how large RMM's arena has to be: it is reserved as a whole, and does not grow."""
    mr = import_module("rmm").mr
    for percent in (102, 105, 110, 115, 120, 130, 140, 160, 200, 250):
        size = trace.peak_live_bytes * percent // 100 // 256 * 256
        try:
            arena = mr.ArenaMemoryResource(mr.CudaMemoryResource(), arena_size=size)
            return trace.replay(_RmmMemory(arena, partial(int, size))).peak_reserved_bytes
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error):
                raise
    raise MemoryError("an arena of 2.5 times the peak is too small")


RMM: dict[str, Callable[[Trace], Allocator] | None] = {
    "RMM pool": _pool,
    "RMM async": _async,
    "RMM arena": None,  # see _smallest_arena
}


def _reserved(name: str, path: str) -> int:
    trace = Trace.load(path)
    if name == OURS:
        return trace.replay(_ours(trace)).peak_reserved_bytes
    if name in peers.TORCH:
        return trace.replay(TorchMemory()).peak_reserved_bytes
    make = RMM[name]
    return trace.replay(make(trace)).peak_reserved_bytes if make else _smallest_arena(trace)


def _prepared(name: str) -> Callable[[str], int]:
    if name in RMM:
        peers.plug_in_rmm()  # every trace has a resource of its own
    return partial(_reserved, name)


if __name__ == "__main__":
    peers.serve(_prepared)
