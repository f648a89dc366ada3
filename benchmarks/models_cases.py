"""What ``models`` measures, and what it asks which process for that."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.models_at_once import ASYNCIO, DECODE, EAGER, ENCODE, GRAPH, SECOND, THREADS
from benchmarks.peers import NATIVE, OURS
from benchmarks.timings import CUDA

SESSION, OUTSIDE = "session", "outside"

SETS = ((DECODE, ENCODE), (DECODE, ENCODE, SECOND))
SUBMITTED = (EAGER, GRAPH) if CUDA else (EAGER,)
SESSIONS, TASKS, STREAMS = "sessions, threads", "sessions, asyncio", "torch streams, threads"
# Where models of each way work, and on what.
AT_ONCE = {SESSIONS: (OURS, THREADS), TASKS: (OURS, ASYNCIO), STREAMS: (NATIVE, THREADS)}
ALONE = (SESSIONS, STREAMS)


@dataclass(frozen=True)
class One:
    """The work of one model, in a way that is an allocator's name or one of ours."""

    work: str
    way: str

    def asked(self, turn: int, seconds: float) -> tuple[str, list[Any]]:
        """Return the process, and the question of a turn."""
        process = OURS if self.way in (SESSION, OUTSIDE) else self.way
        return process, ["rate", self.way, self.work, turn]

    def instead(self, way: str) -> "One":
        """Return the same work in another way."""
        return replace(self, way=way)


@dataclass(frozen=True)
class Several:
    """Models that work at once, or one of them alone, in a way of ``AT_ONCE``."""

    models: tuple[str, ...]
    submitted: str
    way: str

    def asked(self, turn: int, seconds: float) -> tuple[str, list[Any]]:
        """Return the process, and the question of a turn of so many seconds."""
        process, how = AT_ONCE[self.way]
        return process, ["window", how, self.submitted, self.models, seconds]

    def instead(self, way: str) -> "Several":
        """Return the same models in another way."""
        return replace(self, way=way)

    def alone(self) -> list["Several"]:
        """Return each model alone, on a thread of the same process."""
        way = STREAMS if self.way == STREAMS else SESSIONS
        return [Several((model,), self.submitted, way) for model in self.models]


def severals() -> Iterator[Several]:
    """Return models alone, and those that work at once."""
    for submitted in SUBMITTED:
        for model in SETS[-1]:
            for way in ALONE:
                yield Several((model,), submitted, way)
        for models in SETS:
            for way in AT_ONCE:
                yield Several(models, submitted, way)
