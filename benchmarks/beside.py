"""Operations that a thread repeats beside what is measured, and how many of them were done when."""

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from benchmarks.timings import CUDA

Border = Callable[[], AbstractContextManager[object]]


def mark() -> Callable[[], object]:
    """Return what waits for all that the current stream has now."""
    if not CUDA:
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


@dataclass(frozen=True)
class Operation:
    """What a thread repeats: submitted by ``submit``, at most ``queued`` of them at a time."""

    submit: Callable[[], object]
    queued: int = 1


class Repeated:
    """The operations of one thread. It waits for them in the driver, which needs no GIL."""

    def __init__(self, border: Border, operation: Operation) -> None:
        self._border = border
        self._operation = operation
        self._ends: list[float] = []
        self._error: BaseException | None = None
        self._steady = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def completed(self, begin: float, end: float) -> float:
        """Operations done between two moments of ``time.perf_counter()``, with parts of them.

        Exact once the thread has ended: only then is the end of the last one known.
        """
        return completions(self._ends, end) - completions(self._ends, begin)

    def cpu_seconds(self) -> float:
        """Return how long the thread, which must be alive, has been on a CPU so far."""
        assert self._thread.ident
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wait_until_steady(self) -> None:
        """Wait until the queue is full, and cold kernels are loaded; raise what failed."""
        self._steady.wait()
        self._check()

    def stop(self) -> None:
        """Wait until the operations that were submitted are done; raise what failed."""
        self._over.set()
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            with self._border():
                self._repeat()
        except BaseException as error:
            self._error = error
        finally:
            self._steady.set()

    def _repeat(self) -> None:
        waits: deque[Callable[[], object]] = deque()

        def finish_one() -> None:
            waits.popleft()()
            self._ends.append(time.perf_counter())
            if len(self._ends) == self._operation.queued:
                self._steady.set()

        while not self._over.is_set():
            self._operation.submit()
            waits.append(mark())
            if len(waits) == self._operation.queued:
                finish_one()
        while waits:
            finish_one()


@contextmanager
def repeated(border: Border, operation: Operation) -> Iterator[Repeated]:
    """Have a thread repeat the operation until the block ends; raise what it raised."""
    thread = Repeated(border, operation)
    thread.start()
    try:
        thread.wait_until_steady()
        yield thread
    finally:
        thread.stop()


def completions(ends: list[float], moment: float) -> float:
    """Return how many had ended by then, with the part of the next one that had passed."""
    count = bisect_right(ends, moment)
    if count in (0, len(ends)):
        return float(count)
    last, following = ends[count - 1 : count + 1]
    return count + (moment - last) / (following - last)
