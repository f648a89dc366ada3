"""The part of ``qos`` in which others are moved out of VRAM and back beside a guaranteed context.

It is here and not in ``evict``, because it is about the latencies of the same requests, which a row
of ``qos`` has the columns for; ``evict`` has what a session beside it costs the move.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import torch

import pygpukit_torch as pgk
from benchmarks.beside import Border, Operation
from benchmarks.latency import back_to_back
from benchmarks.progress import track
from benchmarks.qos_cases import CLOSED, NOTHING, WARM_UP, Case, Figures, Size, measure, rows
from benchmarks.qos_results import MOVES, MOVING
from benchmarks.qos_ways import BUDGETS, Sides
from benchmarks.qos_work import GENERATE, GRAPH, requests_of
from benchmarks.timings import CUDA, DEVICE
from pygpukit_torch import GB, MB, ExecutionContext, QoSPolicy, context_session

MOVED = 4 * GB if CUDA else 32 * MB  # of each of the two
FULL = Size(8, {GRAPH: (75, 4), GENERATE: (25, 4), NOTHING: (0, 0.25)})
QUICK = Size(1, {GRAPH: (20, 0.08), GENERATE: (2, 0.08), NOTHING: (0, 0.05)})


def measured(quick: bool) -> list[dict[str, Any]]:
    """Measure, and return a row for moves alone and two for each request. ``quick``: fewer."""
    found: dict[Case, Figures] = defaultdict(Figures)
    with _contexts() as (guaranteed, moved):
        _measure(guaranteed, moved, QUICK if quick else FULL, found)
        gc.unfreeze()
        gc.collect()  # models are cyclic; their memory goes before their contexts
    return [
        row | {"GB/s": row["beside/s"] * MOVED / 1e9 if row["beside"] == MOVES else ""}
        for row in rows(found, MOVING, {MOVING: "all"})
    ]


@contextmanager
def _contexts() -> Iterator[tuple[ExecutionContext, list[ExecutionContext]]]:
    """A device with room for all of them, so that nobody goes but by ``evict()``."""
    budget = MOVED + MOVED // 8
    vram = BUDGETS["guaranteed"] + 2 * budget
    pgk.initialize(device=DEVICE, total_vram=vram, host_backup=2 * budget)
    try:
        guaranteed = pgk.create_context(
            "guaranteed", BUDGETS["guaranteed"], qos=QoSPolicy.GUARANTEED
        )
        yield guaranteed, [pgk.create_context(name, budget) for name in ("first", "second")]
    finally:
        for context in pgk.list_contexts():
            context.destroy()
        pgk.shutdown()


def _measure(
    guaranteed: ExecutionContext,
    moved: list[ExecutionContext],
    size: Size,
    found: dict[Case, Figures],
) -> None:
    requests = requests_of(Sides(partial(context_session, guaranteed), nullcontext))
    tensors = [_filled(context) for context in moved]
    steps = [step for context in moved for step in (context.evict, context.restore)]
    for step in steps:
        step()  # makes the host memory
    endless = cycle(steps)
    moves = Operation(lambda: next(endless)())
    # Its moves are done when they return; on the default stream it would wait for more than them.
    border: Border = partial(torch.cuda.stream, torch.cuda.Stream()) if CUDA else nullcontext
    for serve in requests.values():
        back_to_back(serve, *WARM_UP)
    gc.collect()
    gc.freeze()

    def works(beside: str) -> Iterator[tuple[Figures, Callable[[], list[float]]]]:
        if beside == MOVES:
            seconds = size.limits[NOTHING][1]
            yield found[_case(NOTHING, MOVES)], partial(_rest, seconds)
        for request, serve in requests.items():
            yield (
                found[_case(request, beside)],
                partial(back_to_back, serve, *size.limits[request]),
            )

    for turn in track(range(size.turns), "qos beside moves"):
        # Who comes first changes, so that a drift of the clocks favours nobody.
        loads = {NOTHING: None, MOVES: moves}
        for beside in reversed(loads) if turn % 2 else loads:
            measure(border, loads[beside], works(beside))
    tensors.clear()


def _filled(context: ExecutionContext) -> torch.Tensor:
    with context_session(context):
        return torch.ones(MOVED, dtype=torch.uint8, device=DEVICE)


def _rest(seconds: float) -> list[float]:
    time.sleep(seconds)
    return []


def _case(request: str, beside: str) -> Case:
    return Case(MOVING, request, "" if request == NOTHING else CLOSED, beside, False)
