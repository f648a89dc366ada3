"""What contexts cost a model, what several gain from working at once, and what peers make of both.

Every allocator has a process of its own. They are asked in turns: one works, the others wait, idle.
In a turn all ways have the same seed, and who comes first changes. Peers, and several models at
once, take part in every third. Together the processes take some 60 GiB of a GPU.

One model at a time: ``generate`` of a Llama of 0.9 billion parameters, 16 tokens for prompts of 64;
``embedding`` by an encoder as large as BERT, batches of 32 sequences of up to 64 to 512 tokens,
padded to the longest, each result read; ``training`` of a Llama of 0.1 billion with AdamW, 4
sequences of 64 to 512 tokens a step. Every turn has the same lengths in another order, so memory of
many sizes. A session is entered for each request, and for a turn of training.

session      in a context
outside      in the same process and no session: our allocator passes on to torch's
torch ...    with torch's own, as ``PYTORCH_ALLOC_CONF`` sets it up; ours is not there
RMM ...      with NVIDIA's, through its interface for torch, where it is installed

Several models at once: forward passes of one token of the Llama (``decode``), of 64 sequences of
256 tokens of the encoder (``encode``), and of a second Llama. Every model makes one pass after the
other, and waits for each. It is submitted operator by operator (``eager``) or as a graph.

sessions, threads        a context and a thread for each
sessions, asyncio        a context and a task for each, on one event loop
torch streams, threads   a ``torch.cuda.stream`` and a thread for each, with torch's own allocator

rate         the median of the turns, with quartiles. Several models have the sum of what each keeps
             of its rate alone: 1 is as much as one after the other would do, more is a gain
to outside   the median of the ratios to the same turn outside: it is not the ratio of the medians
to native    the same to torch's native allocator in a process of its own, or to torch streams
kept         what each model keeps of its rate alone, on a thread of the same process
off CPU      the part of the time in which the thread of each model was on no CPU
GIL at most  what the models lose by waiting for the GIL, if all that may be that is: without it
             the rate would be larger by this

Nobody can ask the GIL who waits for it. But a thread that waits for the device spins, on a CPU, and
one that waits for the GIL sleeps. So what a thread was off the CPU, by its own clock of CPU time,
beyond what it is alone was waiting for the GIL, or for a lock of the driver or an allocator, or for
a CPU where there are not enough. No model can lose more by it than it lost. That is an upper bound,
with one exception: when the GIL has gone to and fro caches are cold, and a thread takes longer on
its CPU. Two figures tell whether to believe it: alone a thread must hardly be off its CPU, or it
does not spin; and graphs are the control, because a replay needs the GIL for microseconds, so what
their threads are off the CPU is something else. The rest of a loss is the device, which models that
keep it busy have to share. On an event loop passes are submitted one after the other: nobody waits
for the GIL, but for the others' turns.

The host device has no streams and no graphs, and has done its work when it is submitted; its
models are smaller. That shows that the story runs, and no more.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from benchmarks.models_at_once import lost_to_waiting
from benchmarks.models_cases import OUTSIDE, SESSION, STREAMS, One, Several, severals
from benchmarks.peers import NATIVE, OURS, Peer, PeerError, names, started
from benchmarks.report import Report

COLUMNS = [
    "work",
    "way",
    "rate",
    "unit",
    "quartiles",
    "to outside",
    "to native",
    "kept",
    "off CPU",
    "GIL at most",
    "failure",
]


@dataclass(frozen=True)
class Size:
    """How many turns there are, and how many seconds several models work in each."""

    turns: int
    seconds: float


FULL = Size(7, 0.2)
QUICK = Size(4, 0.05)
ALL_EVERY = 3  # turns; the others are for sessions, and what is outside of them


def run(quick: bool) -> Report:
    """Measure. ``quick`` has fewer turns, and several models work for a shorter time."""
    with ExitStack() as stack:
        # All at the same time: most of it is importing.
        processes = {
            name: stack.enter_context(started(name, "benchmarks.models_process"))
            for name in names()
        }
        story = Story(processes, QUICK if quick else FULL)
        story.measure()
    return Report("models", "medians of the turns", COLUMNS, story.rows())


class Story:
    """What the processes were asked, and what they answered turn by turn."""

    def __init__(self, processes: Mapping[str, Peer], size: Size) -> None:
        self._processes = processes
        self._size = size
        self._ways = [SESSION, OUTSIDE, *(name for name in processes if name != OURS)]
        self._units: dict[str, str] = {}
        self._answers: dict[One | Several, dict[int, Any]] = defaultdict(dict)
        self._failures: dict[One | Several, str] = {}

    def measure(self) -> None:
        """Ask for everything, in turns, once all processes are ready."""
        self._units = self._processes[OURS].ask(["units"])
        for process in self._processes.values():
            with suppress(PeerError):  # every row of it will say so
                process.ask(["units"])
        cases: list[One | Several] = [*self._ones(), *severals()]
        for turn in range(self._size.turns):
            # Who comes first changes, so that a drift of the clocks favours nobody.
            for case in reversed(cases) if turn % 2 else cases:
                ours = isinstance(case, One) and case.way in (SESSION, OUTSIDE)
                if ours or turn % ALL_EVERY == 0:
                    self._ask(case, turn)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for everything that was asked for."""
        return [
            *(self._row_of_one(case) for case in self._ones()),
            *(self._row_of_several(case) for case in severals()),
        ]

    def _ones(self) -> Iterator[One]:
        for work in self._units:
            for way in self._ways:
                yield One(work, way)

    def _ask(self, case: One | Several, turn: int) -> None:
        if case in self._failures:
            return
        name, question = case.asked(turn, self._size.seconds)
        try:
            self._answers[case][turn] = self._processes[name].ask(question)
        except PeerError as error:
            self._failures[case] = str(error)

    def _row_of_one(self, case: One) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {
            "at once": "",
            "work": case.work,
            "way": case.way,
            "unit": self._units[case.work],
        }
        if self._has_failed(row, case):
            return row
        rates = self._answers[case]
        row |= _spread(list(rates.values()))
        for column, way in (("to outside", OUTSIDE), ("to native", NATIVE)):
            other = case.instead(way)
            if other not in self._failures and (way == NATIVE or case.way == SESSION):
                others = self._answers[other]
                common = sorted(rates.keys() & others.keys())
                row[column] = _ratio([rates[i] for i in common], [others[i] for i in common])
        return row

    def _row_of_several(self, case: Several) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {
            "at once": len(case.models),
            "work": f"{' + '.join(case.models)}, {case.submitted}",
            "way": case.way,
            "unit": "passes/s" if len(case.models) == 1 else "of one by one",
        }
        if self._has_failed(row, case, *case.alone()):
            return row
        totals = self._totals(case)
        row |= _spread(totals)
        native = case.instead(STREAMS)
        if not {native, *native.alone()} & self._failures.keys():
            row["to native"] = _ratio(totals, self._totals(native))
        off_cpu = self._off_cpu(case)
        row["off CPU"] = _rounded(off_cpu)
        if len(case.models) > 1:
            kept = [statistics.median(turns) for turns in zip(*self._kept(case), strict=True)]
            row["kept"] = _rounded(kept)
            if off_cpu:
                alone = [self._off_cpu(model)[0] for model in case.alone()]
                row["GIL at most"] = lost_to_waiting(kept, off_cpu, alone)
        return row

    def _has_failed(self, row: dict[str, Any], *cases: One | Several) -> bool:
        failures = [self._failures[case] for case in cases if case in self._failures]
        row["failure"] = failures[0] if failures else ""
        return bool(failures)

    def _totals(self, case: Several) -> list[float]:
        """Return the rate of one model, or what several keep of theirs together, by turns."""
        if len(case.models) == 1:
            return [answer["rates"][0] for answer in self._answers[case].values()]
        return [sum(kept) for kept in self._kept(case)]

    def _kept(self, case: Several) -> list[list[float]]:
        """Return what every model keeps of its rate alone, by turns."""
        rates = zip(*(self._totals(model) for model in case.alone()), strict=True)
        return [
            [rate / alone for rate, alone in zip(answer["rates"], rates_alone, strict=True)]
            for answer, rates_alone in zip(self._answers[case].values(), rates, strict=True)
        ]

    def _off_cpu(self, case: Several) -> list[float]:
        answers = self._answers[case].values()
        turns = zip(*(answer["off_cpu"] for answer in answers), strict=True)
        return [statistics.median(parts) for parts in turns]


def _spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"rate": middle, "quartiles": f"{low:.3g}-{high:.3g}"}


def _ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def _rounded(parts: list[float]) -> list[float]:
    return [round(part, 3) for part in parts]
