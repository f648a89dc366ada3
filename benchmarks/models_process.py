"""What the story ``models`` has done by a process with one allocator."""

import gc
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import pygpukit_torch as pgk
from benchmarks import peers
from benchmarks.beside import Border
from benchmarks.models_at_once import (
    ASYNCIO,
    EAGER,
    GRAPH,
    THREADS,
    Model,
    Window,
    captured,
    on_one_loop,
    on_threads,
)
from benchmarks.models_cases import OUTSIDE, SESSION
from benchmarks.models_works import PASSES, Pass, works_of
from benchmarks.peers import NATIVE, OURS
from benchmarks.timings import CUDA, DEVICE, now
from pygpukit_torch import GB, context_session, create_context

ONE, EACH_OF_SEVERAL = (8 * GB, 4 * GB) if CUDA else (GB, GB // 4)  # budgets

HOW: dict[str, Callable[[list[Model], str, float], Window]] = {
    THREADS: on_threads,
    ASYNCIO: on_one_loop,
}


class Process:
    """Models and their works. A question is the name of one of the methods, and its arguments."""

    def __init__(self, name: str) -> None:
        peers.install(name)
        if not CUDA:
            torch.set_num_threads(1)  # each model has a thread
        borders: dict[str, Border] = {name: nullcontext}
        if name == OURS:
            total = ONE + len(PASSES) * EACH_OF_SEVERAL
            pgk.initialize(device=DEVICE, total_vram=total, host_backup=0)
            context = create_context("one at a time", ONE)
            borders = {SESSION: partial(context_session, context), OUTSIDE: nullcontext}
        self._works = {way: works_of(border) for way, border in borders.items()}
        make = {OURS: _in_context, NATIVE: _on_stream}.get(name)
        self._models = {each: make(each) for each in PASSES} if make else {}
        for works in self._works.values():
            for work in works.values():
                with suppress(Exception):  # it is said when it is asked for
                    work.rate(0)
        now()
        # So that the collector has little to walk, whatever else a process has loaded.
        gc.collect()
        gc.freeze()

    def units(self) -> dict[str, str]:
        """Return what the rates of works are."""
        return {name: work.unit for works in self._works.values() for name, work in works.items()}

    def rate(self, way: str, work: str, seed: int) -> float:
        """Return what a model does in a turn, in its units a second."""
        return self._works[way][work].rate(seed)

    def window(self, how: str, way: str, names: list[str], seconds: float) -> dict[str, Any]:
        """Return what several do in the same time."""
        return asdict(HOW[how]([self._models[name] for name in names], way, seconds))


def _in_context(name: str) -> Model:
    context = create_context(name, EACH_OF_SEVERAL)
    border = partial(context_session, context)
    with border():
        submits = _submits(PASSES[name](), None)
    return Model(border, submits, context)


def _on_stream(name: str) -> Model:
    if not CUDA:
        return Model(nullcontext, _submits(PASSES[name](), None))
    stream = torch.cuda.Stream()
    border = partial(torch.cuda.stream, stream)
    with border():
        submits = _submits(PASSES[name](), stream)
    return Model(border, submits)


def _submits(submit: Pass, capture_on: torch.cuda.Stream | None) -> dict[str, Pass]:
    return {EAGER: submit, **({GRAPH: captured(submit, capture_on).replay} if CUDA else {})}


def _prepared(name: str) -> Callable[[list[Any]], Any]:
    process = Process(name)
    return lambda question: getattr(process, question[0])(*question[1:])


if __name__ == "__main__":
    peers.serve(_prepared)
