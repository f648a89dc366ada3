"""Models of two and three times the VRAM, served one request at a time, for every way to do it.

All models are Llamas of one shape with random weights; three of them fit into the VRAM that a way
may use. A request is a ``generate`` of two new tokens by one model, from the prompt on the host to
the tokens on the host; requests come back to back. They ask the models ``in turn``, where the least
recently used model is always the next to be asked, or ``skewed``: at random, by Zipf's law, from a
fixed seed, the same for all ways.

everything resident   all models stay in VRAM, which may be all of the card: the upper bound
contexts              a context for each model; requests enter its session, all else is automatic
contexts, prefetch    the same with ``prefetch()`` of the next model, where it is known: in turn
pinned copies         weights have a copy in pinned memory, are copied in without waiting, and are
                      dropped on the way out: what a careful program can do with torch alone
pinned, next ahead    the same with copies of the next model beside the request, on one more stream
.cpu(), .cuda()       ``model.cpu()`` and ``model.cuda()``
accelerate, models    ``cpu_offload_with_hook``, and ``hook.offload()`` of the model that must go
accelerate, layers    ``cpu_offload``: every layer is brought in whenever it is needed

Ways are in processes of their own; the two with contexts share one, and so do the two with pinned
copies. Where there are no contexts it is torch's own allocator, confined to the same VRAM except
where everything is resident; where whole models move, the least recently used one goes. Processes
are prepared at the same time; then one of them works at a time, and they take turns. All models
were served twice before anything is timed.

count       requests that the figures are of. A turn is limited in seconds, and more so for the last
            three ways, where most requests take long; of fewer than 100 the p99 is the largest
requests/s  one after the other; ``ratio`` is that to everything resident
p50 p99     milliseconds
resident    the part of the requests that found all of their model in VRAM
GiB moved   between host and VRAM, a request, both ways
failure     what went wrong, also if a way's tokens are not those of the others

The host device has no VRAM: contexts move between pieces of host memory, models are copied in place
of being moved, nothing is pinned or copied beside, and accelerate moves nothing. That shows that
the story runs, and no more.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.latency import percentile
from benchmarks.oversubscribe_process import Process, Served, Tokens, processes
from benchmarks.oversubscribe_ways import (
    CONTEXTS,
    LAYERED,
    MOVED,
    OFFLOADED,
    PINNED,
    RESIDENT,
    SERVERS,
)
from benchmarks.oversubscribe_work import (
    CAPACITY,
    IN_TURN,
    RATIOS,
    SKEWED,
    needed,
    requests,
    weight_bytes,
)
from benchmarks.report import Report
from pygpukit_torch import GB

COLUMNS = [
    "VRAM",
    "order",
    "way",
    "models",
    "count",
    "requests/s",
    "ratio",
    "p50",
    "p99",
    "resident",
    "GiB moved",
    "failure",
]


@dataclass(frozen=True)
class Way:
    """A row: who serves, whether it is told the next request, and whether that is slow."""

    server: str
    ahead: bool = False
    slow: bool = False


UPPER_BOUND = "everything resident"
WAYS = {
    UPPER_BOUND: Way(RESIDENT),
    "contexts": Way(CONTEXTS),
    "contexts, prefetch": Way(CONTEXTS, ahead=True),
    "pinned copies": Way(PINNED),
    "pinned, next ahead": Way(PINNED, ahead=True),
    ".cpu(), .cuda()": Way(MOVED, slow=True),
    "accelerate, models": Way(OFFLOADED, slow=True),
    "accelerate, layers": Way(LAYERED, slow=True),
}


@dataclass(frozen=True)
class Size:
    """How often ways take turns, and how many requests and seconds a case has in each."""

    turns: int
    count: int
    seconds: float
    seconds_if_slow: float


FULL = Size(2, 50, 1.3, 0.3)
QUICK = Size(1, 8, 0.3, 0.3)


@dataclass(frozen=True)
class Case:
    """What is measured: a way, the ratio of all weights to the VRAM, and the order of requests."""

    ratio: int
    order: str
    way: str


@dataclass
class Figures:
    """What a case came to over all turns, and what went wrong."""

    served: Served = field(default_factory=Served)
    failure: str = ""

    @property
    def rate(self) -> float:
        """Requests a second; 0 if there were none."""
        latencies = self.served.latencies
        return len(latencies) / sum(latencies) if latencies else 0


def run(quick: bool) -> Report:
    """Measure. ``quick`` has fewer requests."""
    story = Story(QUICK if quick else FULL)
    with processes(list(SERVERS)) as running:
        story.wait(running)
        for turn in range(story.size.turns):
            story.turn(running, turn)
    report = Report("oversubscribe", "milliseconds of a request", COLUMNS, story.rows())
    report.machine["VRAM"] = f"{CAPACITY / GB:.3g} GiB"
    report.machine["model"] = f"{story.weights / GB:.3g} GiB"
    return report


class Story:
    """All cases, measured turn by turn."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.weights = weight_bytes()
        self._figures: dict[Case, Figures] = defaultdict(Figures)
        self._broken: dict[str, str] = {}
        self._wrong: dict[str, str] = {}

    def wait(self, running: dict[str, Process]) -> None:
        """Wait until all models are made, and compare what they answer."""
        answers: dict[str, list[Tokens]] = {}
        for server, process in running.items():
            try:
                answers[server] = process.tokens()
            except Exception as error:
                self._broken[server] = _text(error)
        self._wrong = differing(answers)

    def turn(self, running: dict[str, Process], turn: int) -> None:
        """Measure all cases, except those that have failed."""
        for ratio in RATIOS:
            models = needed(ratio, self.weights)
            for order in (IN_TURN, SKEWED):
                asked = requests(order, models, self.size.count, turn)
                # Who comes first changes, so that a drift of the clocks favours nobody.
                for name in reversed(WAYS) if turn % 2 else WAYS:
                    # Nobody knows the next one of a skewed order.
                    if order == IN_TURN or not WAYS[name].ahead:
                        figures = self._figures[Case(ratio, order, name)]
                        self._measure(figures, WAYS[name], running, asked)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for every case."""
        return [self._row(case, figures) for case, figures in self._figures.items()]

    def _measure(
        self, figures: Figures, way: Way, running: dict[str, Process], asked: list[int]
    ) -> None:
        figures.failure = figures.failure or self._broken.get(way.server, "")
        if figures.failure:
            return
        seconds = self.size.seconds_if_slow if way.slow else self.size.seconds
        try:
            figures.served.add(running[way.server].serve(asked, way.ahead, seconds))
        except Exception as error:
            figures.failure = _text(error)

    def _row(self, case: Case, figures: Figures) -> dict[str, Any]:
        served, count = figures.served, len(figures.served.latencies)
        wrong = f"{served.wrong} of {count} answers are not the first of their model"
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {
            "VRAM": f"{case.ratio}x",
            "order": case.order,
            "way": case.way,
            "models": needed(case.ratio, self.weights),
            "count": count,
            "failure": figures.failure
            or (wrong if served.wrong else self._wrong.get(WAYS[case.way].server, "")),
        }
        if count:
            bound = self._figures[replace(case, way=UPPER_BOUND)].rate
            row |= {
                "requests/s": figures.rate,
                "ratio": figures.rate / bound if bound else "",
                "p50": 1e3 * percentile(served.latencies, 0.5),
                "p99": 1e3 * percentile(served.latencies, 0.99),
                "resident": served.resident / count,
                "GiB moved": served.moved / GB / count,
            }
        return row


def differing(answers: dict[str, list[Tokens]]) -> dict[str, str]:
    """What to say of servers whose models answer otherwise than those of the first one."""
    if not answers:
        return {}
    first, expected = next(iter(answers.items()))
    counts = {
        server: sum(one != other for one, other in zip(tokens, expected, strict=True))
        for server, tokens in answers.items()
    }
    return {
        server: f"{count} of {len(expected)} models answer otherwise than in {first!r}"
        for server, count in counts.items()
        if count
    }


def _text(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
