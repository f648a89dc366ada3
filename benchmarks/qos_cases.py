"""What ``qos`` measures, case by case, and the row of each."""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.beside import Border, Operation, repeated
from benchmarks.latency import percentile

NOTHING = "nothing"
CLOSED, POISSON = "closed", "Poisson"
# Requests and seconds before anything is measured: a process's first requests are slow for long.
WARM_UP = 40, 0.3
COLUMNS = [
    "way",
    "SMs",
    "request",
    "regime",
    "beside",
    ".item()",
    "count",
    "p50",
    "p90",
    "p99",
    "p99 ratio",
    "beside/s",
    "kept",
    "GB/s",
]


@dataclass(frozen=True)
class Size:
    """How many turns there are, and how many requests and seconds a case has in each."""

    turns: int
    limits: dict[str, tuple[int, float]]


@dataclass(frozen=True)
class Case:
    """What is measured: the requests of one kind, in one way, beside something."""

    way: str
    request: str
    regime: str
    beside: str
    items: bool


@dataclass
class Figures:
    """What a case came to over all turns: latencies, and the operations beside in seconds."""

    latencies: list[float] = field(default_factory=list)
    operations: float = 0
    seconds: float = 0

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


def measure(
    border: Border,
    load: Operation | None,
    works: Iterable[tuple[Figures, Callable[[], list[float]]]],
) -> None:
    """Measure one work after the other, beside a thread that repeats the load behind its border."""
    windows: list[tuple[Figures, float, float]] = []
    with repeated(border, load) if load else nullcontext() as thread:
        for figures, latencies in works:
            begin = time.perf_counter()
            figures.latencies += latencies()
            windows.append((figures, begin, time.perf_counter()))
    for figures, begin, end in windows:
        figures.seconds += end - begin
        if thread:
            figures.operations += thread.completed(begin, end)


def rows(measured: dict[Case, Figures], alone: str, sms: dict[str, str]) -> list[dict[str, Any]]:
    """Return a row for every case, compared with its request and its load in the way ``alone``."""
    return [
        _row(
            case,
            measured,
            replace(case, way=alone, beside=NOTHING, items=False),
            Case(alone, NOTHING, "", case.beside, False),
        )
        | {"SMs": sms[case.way]}
        for case in measured
    ]


def _row(
    case: Case, measured: dict[Case, Figures], request_alone: Case, load_alone: Case
) -> dict[str, Any]:
    figures = measured[case]
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {
        "way": case.way,
        "request": case.request,
        "regime": case.regime,
        "beside": case.beside,
        ".item()": "yes" if case.items else "no",
        "count": len(figures.latencies),
    }
    if case.request != NOTHING:
        for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            row[name] = 1e3 * percentile(figures.latencies, part)
        alone = measured[request_alone].latencies
        row["p99 ratio"] = row["p99"] / 1e3 / percentile(alone, 0.99)
    if case.beside != NOTHING:
        row["beside/s"] = figures.rate
        row["kept"] = figures.rate / measured[load_alone].rate
    return row
