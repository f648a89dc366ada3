"""Latency of a guaranteed side beside a best-effort side, for every way to share a device.

Ways, with a thread for either side:

one stream    both on torch's default stream
two streams   a stream each, of the same priority
priority      the guaranteed side's stream has the highest priority that torch offers
tiers         a guaranteed and a best-effort context, in sessions
partitions    the same in partitions; the name tells their shares, ``SMs`` what was granted
yielding      the best-effort context is one that yields: its operators wait while the other works
moving        a guaranteed context, and two of 4 GiB that a thread evicts and restores without pause

In the first three nothing of ours is in the way: no session; the allocator is installed, and passes
on to torch's. Graphs are captured on the stream that replays them; one stream leaves that to torch,
as do sessions, which see to it.

Requests are ``graph``, a step of a decode by 8 Llama layers of 4096, captured; and ``generate``,
eager, of 2 tokens by a Llama of 2 layers of 2048. A request is done when its stream is. Regimes are
``closed``, back to back, and ``Poisson``, an open loop whose arrivals have exponential gaps from a
fixed seed, the same for all ways. Their mean is twice the median that such a request takes alone on
one stream: the server is busy half of the time. There a latency begins with the arrival, also if
another request is being served.

Beside them run products of 8192 x 8192, device-to-device copies of 1 GiB, at most eight of them in
the queue, or another ``generate``. The ``.item()`` loop is one more thread: it makes a small tensor
on the default stream and reads it, outside of sessions; it is there for graphs in the closed loop.

Moving has a run of its own after the others, where the closed loop is measured alone and beside
``moves`` in turns: 600 graphs and 200 ``generate`` each. The two contexts are left as they are, as
weights are: copied out once, and then in. Its ratios are to the same request alone there, and an
operation beside is one ``evict()`` or ``restore()``, of 4 GiB; so ``GB/s`` is what was moved.

count        requests that the percentiles are of, all turns together. A turn of a case is limited
             in seconds, so ``generate`` has some 20 to 60; of fewer than 100 the p99 is the
             largest. An open loop that does not keep up counts those that wait at its end, as
             far as they have.
p50 p90 p99  milliseconds
p99 ratio    to the p99 of the same request in the same regime alone on one stream; so the rows
             beside nothing tell what a way costs by itself
beside/s     operations of best effort a second, while the requests were measured
kept         that as a part of the same load's alone on one stream. The rows of no request are of
             the load alone in its way.
GB/s         bytes that left the device or came back to it

All ways take turns in one run. Both sides share the GIL: who submits kernel by kernel, as
``generate`` does, also waits for the other side's Python. No way to share a device changes that.

The host device has no streams: one stream, tiers and partitions remain, with smaller work, and
partitions limit memory only. That shows that the story runs, and no more.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

from benchmarks import qos_moves
from benchmarks.beside import Operation, repeated
from benchmarks.latency import back_to_back, open_loop, percentile, poisson_arrivals
from benchmarks.progress import track
from benchmarks.qos_cases import (
    CLOSED,
    COLUMNS,
    NOTHING,
    POISSON,
    WARM_UP,
    Case,
    Figures,
    Size,
    measure,
    rows,
)
from benchmarks.qos_ways import ONE_STREAM, Sides, Way, device, ways
from benchmarks.qos_work import GENERATE, GRAPH, item, loads_of, requests_of
from benchmarks.report import Report

FULL = Size(2, {GRAPH: (55, 0.7), GENERATE: (30, 0.3), NOTHING: (0, 0.12)})
QUICK = Size(1, {GRAPH: (20, 0.08), GENERATE: (2, 0.08), NOTHING: (0, 0.05)})


def run(quick: bool) -> Report:
    """Measure. ``quick`` has fewer requests."""
    story = Story(QUICK if quick else FULL)
    compared = ways()
    for turn in range(story.size.turns):
        # Who comes first changes, so that a drift of the clocks favours nobody.
        order = compared[::-1] if turn % 2 else compared
        for way in track(order, f"qos, turn {turn + 1} of {story.size.turns}"):
            story.turn(way, turn)
    report = Report("qos", "milliseconds of a request", COLUMNS, story.rows())
    report.rows += qos_moves.measured(quick)
    for request in (GRAPH, GENERATE):
        gap = f"{1e3 * story.mean_gap(request):.3f} ms"
        report.machine[f"mean gap of Poisson arrivals, {request}"] = gap
    return report


class Story:
    """All cases, measured turn by turn. The first turn must be that of one stream."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._figures: dict[Case, Figures] = defaultdict(Figures)
        self._sms: dict[str, str] = {}
        self._gaps: dict[str, float] = {}

    def mean_gap(self, request: str) -> float:
        """Seconds between Poisson arrivals: as the first turn has it, and the same for all ways."""
        if request not in self._gaps:
            alone = self._figures[Case(ONE_STREAM, request, CLOSED, NOTHING, False)]
            self._gaps[request] = 2 * percentile(alone.latencies, 0.5)
        return self._gaps[request]

    def turn(self, way: Way, seed: int) -> None:
        """Measure all cases of a way; open loops with the arrivals of the seed."""
        with device(), way.sides() as sides:
            self._sms[way.name] = sides.sms
            self._measure(way.name, sides, seed)
            gc.unfreeze()
            gc.collect()  # models are cyclic; their memory goes before their contexts

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for every case."""
        return rows(self._figures, ONE_STREAM, self._sms)

    def _measure(self, way: str, sides: Sides, seed: int) -> None:
        requests = requests_of(sides)
        for serve in requests.values():
            back_to_back(serve, *WARM_UP)
        loads = {NOTHING: None, **loads_of(sides)}
        # So that the collector has little to walk, and a long pause is not some way's latency.
        gc.collect()
        gc.freeze()
        for beside, load in loads.items():
            works = self._works(way, beside, requests, seed)
            measure(sides.best_effort, load, works)

    def _works(
        self, way: str, beside: str, requests: dict[str, Callable[[], None]], seed: int
    ) -> Iterator[tuple[Figures, Callable[[], list[float]]]]:
        for items in (False, True):
            with repeated(nullcontext, Operation(item)) if items else nullcontext():
                for case in self._cases(way, beside, items):
                    yield self._figures[case], partial(self._latencies, case, requests, seed)

    def _cases(self, way: str, beside: str, items: bool) -> Iterator[Case]:
        if not items and beside != NOTHING:
            yield Case(way, NOTHING, "", beside, items)
        yield Case(way, GRAPH, CLOSED, beside, items)
        if not items:
            yield Case(way, GENERATE, CLOSED, beside, items)
            for request in (GRAPH, GENERATE):
                yield Case(way, request, POISSON, beside, items)

    def _latencies(
        self, case: Case, requests: dict[str, Callable[[], None]], seed: int
    ) -> list[float]:
        count, seconds = self.size.limits[case.request]
        if case.request == NOTHING:
            time.sleep(seconds)
            return []
        if case.regime == POISSON:
            arrivals = poisson_arrivals(self.mean_gap(case.request), count, seed)
            return open_loop(requests[case.request], arrivals, seconds)
        return back_to_back(requests[case.request], count, seconds)
