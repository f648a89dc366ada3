"""Contexts that move out of VRAM and back, against pinned copies of the same machine.

Three sets of tensors, each in a context of its own:

out          ``ctx.evict()``, until it returns: then others can have all of the pages
in           entering a session of an evicted context, until the ``with`` block begins
first kernel from entering until a kernel that reads the context's memory is done
A out, B in  entering B while A is resident, with room for little more than one of them

Rates count the bytes of the tensors; for A and B they count what was copied, both ways together.
``GiB copied`` is what was copied indeed, in whole pages. ``pinned`` are torch's copies between
pinned memory and the device, in the same turns; a ratio is the part of their rate that was reached.

``beside a session`` is the same while another context, in a session that stays open, decodes step
after step: as the graph of ``qos`` on CUDA. The ratio there is to the rate with nobody at work.

The last rows are pairs of allocate + free in a session, one by one, beside an eviction of another
context: in C++, through torch's allocator interface. Their ratio is that of the times.

Without a GPU all of it is about the host device, where memory is copied to other memory.
"""

import gc
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaForCausalLM

import pygpukit_torch as pgk
from benchmarks import memory_saver
from benchmarks.alloc_pairs import LIVE, load_loop
from benchmarks.beside import Operation, repeated
from benchmarks.llama import llama_config
from benchmarks.progress import track
from benchmarks.qos_ways import BUDGETS
from benchmarks.qos_work import Decode
from benchmarks.report import Report
from benchmarks.timings import (
    CUDA,
    DEVICE,
    PINNED_BOTH,
    PINNED_IN,
    PINNED_OUT,
    Tensors,
    Timings,
    Turn,
    copied_bytes,
    now,
    spread,
    wait_for_host_pool,
)
from pygpukit_torch import GB, KB, MB, ExecutionContext, context_session

FIRST_TIMES = 2  # more of them say little, and each needs a new device
PEER_TIMES = 3  # each takes seconds
GRANULARITY = 2 * MB  # of a capacity
PAIR_BYTES = 64 * KB
PAIRS = 2_000  # between two looks at the clock

ALONE, BESIDE = "alone", "while evicting"

Make = Callable[[], Tensors]


def run(quick: bool) -> Report:
    """Measure. ``quick`` moves less, and fewer times."""
    total = (GB if quick else 2 * GB) if CUDA else 32 * MB
    repetitions = 3 if quick else 5
    pinned = Pinned(total // 4)
    report = Report(
        "evict",
        "medians",
        [
            "tensors",
            "what",
            "time",
            "unit",
            "quartiles",
            "GiB copied",
            "GiB/s",
            "GB/s",
            "ratio",
            "to",
        ],
    )
    shape = (2048, 21 if total > GB else 9) if CUDA else (256, 4)
    sets: dict[str, Make] = {
        "few large": partial(_equal, 8, total // 8),
        "many small": partial(_equal, total // (200 * KB), 200 * KB),
        "Llama": partial(_llama, *shape),
    }
    for name, make in track(sets.items(), "evict"):
        with torch.device("meta"):
            size = sum(tensor.nbytes for tensor in make())
        timings = Timings(size)
        _copied_by_torch(make, timings)
        _for_the_first_time(make, timings)
        _again_and_again(make, timings, pinned, repetitions)
        if name == "few large":
            report.machine["torch_memory_saver"] = _peer(timings)
            _beside_a_session(make, timings, repetitions)
        report.rows += timings.rows(name)
    report.rows += _beside_an_eviction(sets["few large"], total, repetitions)
    return report


# Tensors ----------------------------------------------------------------------------------------


def _equal(count: int, size: int) -> Tensors:
    return [torch.ones(size, dtype=torch.uint8) for _ in range(count)]


def _llama(hidden: int, layers: int) -> Tensors:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(llama_config(hidden, layers))
    finally:
        torch.set_default_dtype(default)
    return list(model.requires_grad_(False).parameters())


def _made(make: Make, context: ExecutionContext) -> Tensors:
    with context_session(context), torch.device(DEVICE):
        return make()


def _change(context: ExecutionContext, tensors: Tensors) -> None:
    with context_session(context):
        for tensor in tensors:
            tensor.neg_()


# Pinned copies ---------------------------------------------------------------------------------


class Pinned:
    """Copies between pinned memory and the device, of ``size`` bytes each way."""

    def __init__(self, size: int) -> None:
        self._size = size
        empty = partial(torch.empty, size, dtype=torch.uint8)
        self._host = [empty(pin_memory=CUDA).fill_(1) for _ in range(2)]
        self._device = [empty(device=DEVICE).fill_(1) for _ in range(2)]
        self._streams = [torch.cuda.Stream() for _ in range(2)] if CUDA else []

    def time(self, timings: Timings) -> None:
        """Copy out, in, and both at once."""
        out = partial(self._host[0].copy_, self._device[0], non_blocking=True)
        in_ = partial(self._device[1].copy_, self._host[1], non_blocking=True)
        for what, copies in ((PINNED_OUT, [out]), (PINNED_IN, [in_]), (PINNED_BOTH, [out, in_])):
            start = now()
            self._at_once(copies)
            timings.add(what, Turn(now() - start, len(copies) * self._size))

    def _at_once(self, copies: Sequence[Callable[[], torch.Tensor]]) -> None:
        if CUDA:
            for copy, stream in zip(copies, self._streams, strict=False):
                with torch.cuda.stream(stream):
                    copy()
            return
        threads = [threading.Thread(target=copy) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


# What is timed ----------------------------------------------------------------------------------


@contextmanager
def _device(size: int, *names: str) -> Iterator[list[ExecutionContext]]:
    """A new device with room for little more than ``size`` bytes, and contexts that may have it."""
    capacity = (size + size // 8) // GRANULARITY * GRANULARITY
    pgk.initialize(device=DEVICE, total_vram=capacity, host_backup=3 * capacity)
    try:
        yield [pgk.create_context(name, capacity) for name in names]
    finally:
        for context in pgk.list_contexts():
            context.destroy()
        pgk.shutdown()


def _copied_by_torch(make: Make, timings: Timings) -> None:
    with torch.device(DEVICE):
        tensors = make()
    for _ in range(FIRST_TIMES):
        start = now()
        host = [tensor.to("cpu", copy=True) for tensor in tensors]
        timings.add(".cpu()", Turn(now() - start, timings.size))
        tensors.clear()
        start = now()
        tensors = [tensor.to(DEVICE, copy=True) for tensor in host]
        timings.add(".cuda()", Turn(now() - start, timings.size))
    tensors.clear()
    if CUDA:
        torch.cuda.empty_cache()


def _for_the_first_time(make: Make, timings: Timings) -> None:
    for _ in range(FIRST_TIMES):
        # Its budget fits: nobody expects it to be evicted.
        with _device(timings.size, "a") as (context,):
            tensors = _made(make, context)
            if pgk.stats().host_reserved:
                raise RuntimeError("the host pool is not cold")
            timings.out("first out, cold pool", context)
            timings.enter("in, after that", "", context, tensors)
            tensors.clear()
        # On the host device nothing is made ahead.
        if CUDA:
            with _device(timings.size, "a", "b") as (context, _):
                tensors = _made(make, context)
                wait_for_host_pool()
                timings.out("first out, pool made ahead", context)
                tensors.clear()


def _again_and_again(make: Make, timings: Timings, pinned: Pinned, repetitions: int) -> None:
    with _device(timings.size, "a", "b") as (a, b):
        x = _made(make, a)
        a.evict()
        wait_for_host_pool()
        with context_session(a):
            pass
        for _ in range(repetitions):
            pinned.time(timings)
            _change(a, x)
            timings.out("out, changed", a)
            timings.enter("in", "to first kernel, evicted", a, x)
            timings.enter("", "to first kernel, resident", a, x)
            timings.out("out, unchanged", a)
            timings.enter("in", "to first kernel, evicted", a, x)
        y = _made(make, b)
        for _ in range(repetitions):
            _change(b, y)
            for what, context in (("changed", a), ("unchanged", b)):
                copied = copied_bytes(a, b)
                start = now()
                with context_session(context):
                    seconds = time.perf_counter() - start
                copied = copied_bytes(a, b) - copied
                timings.add(f"A out, B in, {what}", Turn(seconds, copied, copied))
        x.clear()
        y.clear()


def _beside_a_session(make: Make, timings: Timings, repetitions: int) -> None:
    with _device(timings.size + BUDGETS["guaranteed"], "a", "decoding") as (a, decoding):
        _while_decoding(make, timings, repetitions, a, decoding)
        gc.collect()  # on the host device a decode is cyclic


def _while_decoding(
    make: Make,
    timings: Timings,
    repetitions: int,
    a: ExecutionContext,
    decoding: ExecutionContext,
) -> None:
    tensors = _made(make, a)
    a.evict()
    wait_for_host_pool()
    session = partial(context_session, decoding)
    with session():
        decode = Decode(None)
    with context_session(a):
        pass
    with repeated(session, Operation(decode)):
        for _ in range(repetitions):
            _change(a, tensors)
            timings.out("out, changed, beside a session", a)
            timings.enter("in, beside a session", "", a, tensors)
            timings.out("out, unchanged, beside a session", a)
            timings.enter("in, beside a session", "", a, tensors)
    tensors.clear()


def _peer(timings: Timings) -> str:
    """Time torch_memory_saver; what to say of it."""
    version = memory_saver.installed()
    if version is None or not CUDA:
        return "not installed" if CUDA else "needs a GPU"
    for retained, name in ((False, ""), (True, " retained")):
        try:
            times = memory_saver.seconds(timings.size, PEER_TIMES, retained)
        except RuntimeError as error:
            return f"{version}{name}: {error}"
        for way, values in times.items():
            for seconds in values:
                timings.add(f"torch_memory_saver{name}, {way}", Turn(seconds, timings.size))
    return version


def _beside_an_eviction(make: Make, size: int, repetitions: int) -> list[dict[str, Any]]:
    """Pairs of allocate + free in a session, while another context is evicted and while not."""
    time_each = partial(load_loop().time_each_current, CUDA, PAIR_BYTES, PAIRS, LIVE)
    percentiles: dict[tuple[str, int], list[float]] = defaultdict(list)
    with _device(size + size // 4, "large", "small") as (large, small):
        tensors = _made(make, large)
        large.evict()
        for _ in range(repetitions):
            _change(large, tensors)
            now()
            with _sampled(time_each, small) as chunks:
                time.sleep(0.1)
                marks = [time.perf_counter() - 0.09, time.perf_counter()]
                large.evict()
                marks.append(time.perf_counter())
            for name, (begin, end) in zip((ALONE, BESIDE), pairwise(marks), strict=True):
                pairs = [
                    pair
                    for start, stop, each in chunks
                    if stop > begin and start < end
                    for pair in each
                ]
                cuts = statistics.quantiles(pairs, n=100)
                percentiles[name, 50].append(cuts[49])
                percentiles[name, 99].append(cuts[98])
        tensors.clear()
    return [
        {
            "tensors": "",
            "what": f"pair p{percent}, {key}",
            **spread(percentiles[key, percent], "ns"),
            "GiB": moved / GB,
            "GiB copied": moved / GB,
            "GiB/s": "",
            "GB/s": "",
            "ratio": statistics.median(percentiles[key, percent])
            / statistics.median(percentiles[ALONE, percent]),
            "to": "alone",
        }
        for percent in (50, 99)
        for key, moved in ((ALONE, 0), (BESIDE, size))
    ]


@contextmanager
def _sampled(
    time_each: Callable[[], list[float]], context: ExecutionContext
) -> Iterator[list[tuple[float, float, list[float]]]]:
    """Pairs of another thread in a session of the context: begin, end, nanoseconds of each."""
    chunks: list[tuple[float, float, list[float]]] = []
    over = threading.Event()

    def work() -> None:
        with context_session(context):
            while not over.is_set():
                start = time.perf_counter()
                each = time_each()
                chunks.append((start, time.perf_counter(), each))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield chunks
    finally:
        over.set()
        thread.join()
