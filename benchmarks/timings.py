"""What evicting and entering contexts took, turn by turn, against pinned copies of the same run."""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from pygpukit_torch import GB, ExecutionContext, context_session, stats

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

PINNED_OUT, PINNED_IN, PINNED_BOTH = "pinned out", "pinned in", "pinned both ways"
# What is timed, and what it is compared with.
AGAINST = {
    PINNED_OUT: "",
    PINNED_IN: "",
    PINNED_BOTH: "",
    ".cpu()": PINNED_OUT,
    ".cuda()": PINNED_IN,
    "torch_memory_saver, out": PINNED_OUT,
    "torch_memory_saver, in": PINNED_IN,
    "torch_memory_saver retained, out": PINNED_OUT,
    "torch_memory_saver retained, in": PINNED_IN,
    "first out, cold pool": PINNED_OUT,
    "in, after that": PINNED_IN,
    "first out, pool made ahead": PINNED_OUT,
    "out, changed": PINNED_OUT,
    "out, unchanged": PINNED_OUT,
    "in": PINNED_IN,
    "to first kernel, evicted": PINNED_IN,
    "to first kernel, resident": "",
    "A out, B in, changed": PINNED_BOTH,
    "A out, B in, unchanged": PINNED_IN,
    "out, changed, beside a session": "out, changed",
    "out, unchanged, beside a session": "out, unchanged",
    "in, beside a session": "in",
}

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Turn:
    """One turn: how long it took for how many bytes, and how many were copied (None: all)."""

    seconds: float
    moved: int
    copied: int | None = None


class Timings:
    """What one set of tensors took, by the names of ``AGAINST``. ``size``: its bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._turns: dict[str, list[Turn]] = defaultdict(list)

    def add(self, what: str, turn: Turn) -> None:
        """Keep one turn."""
        self._turns[what].append(turn)

    def out(self, what: str, context: ExecutionContext) -> None:
        """Evict it, and keep what that took."""
        copied = copied_bytes(context)
        start = now()
        context.evict()
        seconds = time.perf_counter() - start
        if context.usage().reserved:
            raise RuntimeError(f"{context!r} still holds pages")
        self.add(what, Turn(seconds, self.size, copied_bytes(context) - copied))

    def enter(self, what: str, kernel: str, context: ExecutionContext, x: Tensors) -> None:
        """Enter it, and keep what that took, and also what it took with a kernel that reads ``x``.

        Either only if it has a name.
        """
        # Outside of the context, whose pages are to stay as they are.
        result = torch.empty(1024, dtype=x[0].dtype, device=DEVICE)
        copied = copied_bytes(context)
        start = now()
        with context_session(context):
            entered = time.perf_counter() - start
            torch.neg(x[0].view(-1)[:1024], out=result)
            context.stream.synchronize()
            done = time.perf_counter() - start
        copied = copied_bytes(context) - copied
        # A resident one moves nothing.
        moved = self.size if copied else 0
        if what:
            self.add(what, Turn(entered, moved, copied))
        if kernel:
            self.add(kernel, Turn(done, moved, copied))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return a row for everything that was timed."""
        return [self._row(name, what) for what in AGAINST if self._turns[what]]

    def _rate(self, what: str) -> float:
        return statistics.median(turn.moved / turn.seconds for turn in self._turns[what])

    def _row(self, name: str, what: str) -> dict[str, Any]:
        turns = self._turns[what]
        moved = statistics.median(turn.moved for turn in turns)
        copied = statistics.median(
            turn.moved if turn.copied is None else turn.copied for turn in turns
        )
        other = AGAINST[what]
        return {
            "tensors": name,
            "what": what,
            **spread([1e3 * turn.seconds for turn in turns], "ms"),
            "GiB": moved / GB,
            "GiB copied": copied / GB,
            "GiB/s": self._rate(what) / GB if moved else "",
            "GB/s": self._rate(what) / 1e9 if moved else "",
            "ratio": self._rate(what) / self._rate(other) if other else "",
            "to": other,
        }


def spread(values: list[float], unit: str) -> dict[str, Any]:
    """Return the median and the quartiles as parts of a row."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"time": middle, "unit": unit, "quartiles": f"{low:.3g}-{high:.3g}"}


def now() -> float:
    """The time, once the device has done all that was submitted."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def copied_bytes(*contexts: ExecutionContext) -> int:
    """Return how much of the contexts was copied so far, both ways."""
    figures = [context.memory_stats() for context in contexts]
    ways = ("evicted_bytes.copied_out", "evicted_bytes.copied_in")
    return sum(each[way] for each in figures for way in ways)


def wait_for_host_pool() -> None:
    """Return once no more host memory is made ahead."""
    before = -1
    while (made := stats().host_reserved) != before:
        before = made
        time.sleep(0.3)
