"""What the borders of sessions cost and protect from, for three ways to give a context a stream.

A decode-like chain of small operators runs in a guaranteed session, beside a best-effort loop of
large matrix products in another thread:

session     ``context_session``: non-blocking streams, ordered on entering, waited for on leaving
blocking    streams that synchronise with the default stream, nothing else
plain       ``torch.cuda.stream`` over non-blocking streams, nothing else

with the input of the decode made inside or outside of the session, and with or without a third
thread that calls ``.item()`` on the default stream. Safe is who reads the right result right after;
concurrent who lets the matrix products go on; without inversion whose latency stays the same.
"""

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

import pygpukit_torch as pgk
from benchmarks.progress import track
from benchmarks.report import Report
from pygpukit_torch import GB, QoSPolicy

STEPS = 20
Border = Callable[[], AbstractContextManager[object]]


def run(quick: bool) -> Report:
    """Measure. ``quick`` runs fewer repetitions."""
    repetitions = 40 if quick else 120
    pgk.initialize(device="cuda", total_vram=16 * GB)
    high = pgk.create_context("guaranteed", GB, qos=QoSPolicy.GUARANTEED)
    low = pgk.create_context("best effort", 4 * GB, qos=QoSPolicy.BEST_EFFORT)
    report = Report(
        "borders",
        "ms of a decode",
        [
            "way",
            "beside",
            "input",
            ".item() loop",
            "p50",
            "p90",
            "p99",
            "products/s",
            "wrong results",
        ],
    )
    ways: dict[str, tuple[Border, Border]] = {
        "session": (lambda: pgk.context_session(high), lambda: pgk.context_session(low)),
        "blocking": (_on(_stream(0, -5)), _on(_stream(0, 0))),
        "plain": (_on(_stream(1, -5)), _on(_stream(1, 0))),
    }
    for way, (decodes, floods) in track(ways.items(), "borders"):
        report.rows.append(_row(way, decodes, None, False, False, repetitions))
        for outside in (False, True):
            for items in (False, True):
                report.rows.append(_row(way, decodes, floods, outside, items, repetitions))
    high.destroy()
    low.destroy()
    pgk.shutdown()
    return report


def _row(
    way: str, decodes: Border, floods: Border | None, outside: bool, items: bool, repetitions: int
) -> dict[str, object]:
    small = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    with _flood(floods) as products, _item_loop(items):
        for _ in range(3):
            with decodes():
                torch.tanh(small @ small)
        time.sleep(0.3)
        begin, count_before = time.perf_counter(), products[0]
        times: list[float] = []
        wrong = 0
        for turn in range(repetitions):
            start = time.perf_counter()
            if outside:
                marker = torch.full((64,), float(turn)).cuda()
            with decodes():
                if not outside:
                    marker = torch.full((64,), float(turn), device="cuda")
                state = small
                for _ in range(STEPS):
                    state = torch.tanh(state @ small * 0.01)
                result = marker + (state[0, 0] * 0).float()
                if way != "session":
                    torch.cuda.current_stream().synchronize()
            times.append(time.perf_counter() - start)
            wrong += _read_too_early(decodes, turn)
            assert result[0].item() == turn or way != "session"
            time.sleep(0.002)
        rate = (products[0] - count_before) / (time.perf_counter() - begin)
    torch.cuda.synchronize()
    cuts = statistics.quantiles(times, n=100)
    return {
        "way": way,
        "beside": "best effort" if floods else "nothing",
        "input": "outside" if outside else "inside",
        ".item() loop": "yes" if items else "no",
        "p50": cuts[49] * 1e3,
        "p90": cuts[89] * 1e3,
        "p99": cuts[98] * 1e3,
        "products/s": rate,
        "wrong results": f"{wrong} of {repetitions}",
    }


def _read_too_early(border: Border, turn: int) -> bool:
    """Whether a result is wrong when it is read on the default stream right after the border."""
    target = torch.zeros(1 << 16, device="cuda")
    torch.cuda.default_stream().synchronize()
    with border():
        torch.cuda._sleep(200_000)
        target.fill_(turn + 1)
    return target.sum().item() != (turn + 1) * (1 << 16)


@contextmanager
def _flood(border: Border | None) -> Iterator[list[int]]:
    done = [0]
    stop = threading.Event()

    def work() -> None:
        assert border is not None
        with border():
            large = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        while not stop.is_set():
            with border():
                for _ in range(10):
                    large @ large
                torch.cuda.current_stream().synchronize()
            done[0] += 10

    yield from _beside(work if border else None, stop, done)


@contextmanager
def _item_loop(wanted: bool) -> Iterator[list[int]]:
    done = [0]
    stop = threading.Event()

    def work() -> None:
        value = torch.ones(8, device="cuda")
        while not stop.is_set():
            value.sum().item()
            done[0] += 1
            time.sleep(0.002)

    yield from _beside(work if wanted else None, stop, done)


def _beside(
    work: Callable[[], None] | None, stop: threading.Event, done: list[int]
) -> Iterator[list[int]]:
    thread = threading.Thread(target=work) if work else None
    if thread:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        if thread:
            thread.join()


def _stream(flags: int, priority: int) -> torch.cuda.ExternalStream:
    """Make a stream of the driver: flags 0 synchronises with the default stream, 1 does not."""
    torch.cuda.init()
    torch.cuda.synchronize()
    handle = ctypes.c_void_p()
    driver = ctypes.CDLL("libcuda.so.1")
    if driver.cuStreamCreateWithPriority(ctypes.byref(handle), flags, priority):
        raise RuntimeError("cuStreamCreateWithPriority failed")
    return torch.cuda.ExternalStream(handle.value)


def _on(stream: torch.cuda.ExternalStream) -> Border:
    return lambda: torch.cuda.stream(stream)
