"""What one context, or one block, takes when there are many of them.

contexts  made, entered and left, grown by their first page, asked for their usage, told by
          ``stats()``, and destroyed: microseconds a context
blocks    that all live together in one context: nanoseconds a block to make them, to free them and
          to make them again, beside the same by torch's own allocator. New ones of 64 MiB are of
          new memory: two pages each, or a call of ``cudaMalloc``
records   bytes of the heap that a live block takes, where its pages hold nothing else

Growth is linear where a figure stays the same as the count grows.
"""

import ctypes
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch

import pygpukit_torch as pgk
from benchmarks.alloc_pairs import load_loop
from benchmarks.progress import track
from benchmarks.report import Report, size_name
from benchmarks.timings import CUDA, DEVICE
from pygpukit_torch import GB, KB, MB, context_session, native

CONTEXTS = [10, 100, 1000]
BLOCKS = [1_000, 10_000, 100_000, 1_000_000]
BLOCK = KB
LARGE_BLOCK, LARGE_BLOCKS = 64 * MB, 100 if CUDA else 10
BUDGET = 8 * MB
PAGE = 32 * MB


def run(quick: bool) -> Report:
    """Measure. ``quick`` has a tenth of the contexts and of the blocks."""
    part = 10 if quick else 1
    report = Report(
        "scale", "a context, or a block", ["what", "count", "ours", "unit", "torch", "ratio"]
    )
    loop = load_loop()
    loop.remember_stock(CUDA)
    pgk.initialize(device=DEVICE, total_vram=16 * GB, host_backup=0)
    for count in track([most // part for most in CONTEXTS], "contexts"):
        report.rows += _contexts(count)
    for count in track([most // part for most in BLOCKS], "blocks"):
        report.rows += _blocks(loop, BLOCK, count)
        report.rows.append(_row("record of a live block", count, _record_bytes(count), "B"))
    report.rows += _blocks(loop, LARGE_BLOCK, LARGE_BLOCKS // part)
    pgk.shutdown()
    return report


def _row(
    what: str, count: int, ours: float, unit: str, torchs: float | None = None
) -> dict[str, Any]:
    return {
        "what": what,
        "count": count,
        "ours": ours,
        "unit": unit,
        "torch": "" if torchs is None else torchs,
        "ratio": "" if torchs is None else ours / torchs,
    }


def _contexts(count: int) -> list[dict[str, Any]]:
    contexts: list[pgk.ExecutionContext] = []
    kept: list[torch.Tensor] = []

    def grow() -> None:
        for context in contexts:
            with context_session(context):
                kept.append(torch.empty(MB, dtype=torch.uint8, device=DEVICE))

    def enter() -> None:
        for context in contexts:
            with context_session(context):
                pass

    def destroy() -> None:
        for context in contexts:
            context.destroy()

    steps: dict[str, Callable[[], object]] = {
        "create": lambda: contexts.extend(
            pgk.create_context(f"{number}", BUDGET) for number in range(count)
        ),
        "first page": grow,
        "enter + exit": enter,
        "usage": lambda: [context.usage() for context in contexts],
        "stats()": pgk.stats,
        "destroy": destroy,
    }
    rows: list[dict[str, Any]] = []
    for what, step in steps.items():
        if step is destroy:
            kept.clear()
        start = time.perf_counter()
        step()
        rows.append(_row(what, count, 1e6 * (time.perf_counter() - start) / count, "us"))
    return rows


def _blocks(loop: Any, size: int, count: int) -> list[dict[str, Any]]:
    stock = loop.time_many(CUDA, False, size, count)
    if CUDA:
        torch.cuda.empty_cache()
    context = pgk.create_context("blocks", 8 * GB if CUDA else 2 * GB)
    with context_session(context):
        ours = loop.time_many(CUDA, True, size, count)
    context.destroy()
    names = [f"{what} of {size_name(size)}" for what in ("new block", "free block", "block again")]
    return [
        _row(name, count, own, "ns", other)
        for name, own, other in zip(names, ours, stock, strict=True)
    ]


def _record_bytes(count: int) -> float:
    pages = -(-count * BLOCK // PAGE)
    arena = native.Arena(PAGE, pages)
    before = _heap_bytes()
    arena.add_pages(0, pages)
    for _ in range(count):
        arena.allocate(BLOCK // 512)
    return (_heap_bytes() - before) / count


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo2() returns."""

    _fields_: ClassVar = [
        ("arena, ordblks, smblks, hblks", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks, fsmblks", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("fordblks, keepcost", ctypes.c_size_t * 2),
    ]


def _heap_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)
