"""Everything at once, for minutes, while memory is short by half: no value may be wrong.

Eight contexts of all tiers have a thread each, a ninth thread runs an event loop. They hand tensors
to each other without declaring anything, and use them in sessions, on the default stream, on side
streams and in graphs, beside backward passes. What each tensor must hold is always known.

    python -m tests.gpu.storm --seconds 480 --report FILE

The exit status is 1 if anything was wrong, 3 if nobody got on for a minute. ``--device cpu`` tries
the same on the host device, without what needs CUDA, and only reads what is handed over.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import os
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import pygpukit_torch as pgk
from benchmarks.provenance import commit, driver
from pygpukit_torch import GB, ContextBusyError, QoSPolicy, context_session, get_stream
from tests.gpu.known import Model, Sheet

HANG = 60.0  # seconds
TIERS = [QoSPolicy.GUARANTEED] * 2 + [QoSPolicy.BURSTABLE] * 3 + [QoSPolicy.BEST_EFFORT] * 3
# In 32nds of the device: all weights together are nearly twice the device.
BUDGETS = {QoSPolicy.GUARANTEED: 4, QoSPolicy.BURSTABLE: 12, QoSPolicy.BEST_EFFORT: 12}
WEIGHTS = {QoSPolicy.GUARANTEED: 2, QoSPolicy.BURSTABLE: 9, QoSPolicy.BEST_EFFORT: 9}
# How often a context is sent out by hand: nobody of a lower tier could make it go.
SENT_OUT = {QoSPolicy.GUARANTEED: 0.3, QoSPolicy.BURSTABLE: 0.6, QoSPolicy.BEST_EFFORT: 0.1}
COUNTED = ("checks", "refusals", "busy", "handovers", "replays", "backwards")
SUMMED = ("bytes_out", "bytes_in", "pages_unchanged")


class Tally:
    """What all threads count."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.waits: dict[str, list[float]] = {"entered": [], "refused": []}
        self.start = self.progress = time.monotonic()
        self.is_over = threading.Event()
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def check(self, is_right: bool, what: str) -> None:
        self.count("checks")
        self.progress = time.monotonic()
        if not is_right:
            self.mistake(what)

    def mistake(self, what: str) -> None:
        who = threading.current_thread().name
        text = f"after {time.monotonic() - self.start:.1f} s, {who}: {what}"
        self.wrong.append(text)
        print("WRONG", text, file=sys.stderr, flush=True)

    @contextmanager
    def entering(self) -> Iterator[None]:
        start, result = time.perf_counter(), "refused"
        try:
            yield
            result = "entered"
        finally:
            self.waits[result].append(time.perf_counter() - start)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """How many there are, and in milliseconds how long."""
    ordered = [round(1e3 * one, 3) for one in sorted(seconds)] or [0.0]
    p50, p99 = (ordered[int(share * len(ordered))] for share in (0.5, 0.99))
    return {"count": len(seconds), "p50": p50, "p99": p99, "longest": ordered[-1]}


class Storm:
    """The contexts, and what their threads share."""

    def __init__(self, device: str, size: int, seed: int, tally: Tally) -> None:
        self.device, self.is_cuda, self.unit = device, device == "cuda", size // 32
        pgk.initialize(device=device, total_vram=size, host_backup=3 * size, claim_timeout=5)
        self.tally, self.stop = tally, threading.Event()
        self.models = []
        for number, tier in enumerate(TIERS):
            name, budget = f"{tier.value} {number}", BUDGETS[tier] * self.unit
            base = self.unit if tier is QoSPolicy.BURSTABLE else None
            context = pgk.create_context(name, budget, base_vram=base, qos=tier)
            start = seed + 100 * number
            self.models.append(Model(context, WEIGHTS[tier], self.unit, start, device))
            context.evict()
            tally.progress = time.monotonic()
        self.inboxes: list[queue.Queue[Sheet]] = [queue.Queue() for _ in range(len(TIERS) + 1)]

    def fresh(self, choice: random.Random, context: pgk.ExecutionContext) -> Sheet:
        size = choice.randint(self.unit // 8, self.unit // 2)
        return Sheet(size, choice.randrange(1 << 20), context.name, self.device)

    def received(self, number: int) -> Sheet | None:
        with suppress(queue.Empty):
            return self.inboxes[number].get_nowait()
        return None

    def hand_over(self, choice: random.Random, sheets: list[Sheet]) -> None:
        for sheet in sheets:
            inbox = choice.choice(self.inboxes)
            if inbox.qsize() < 2:  # else it ends here
                self.tally.count("handovers")
                inbox.put(sheet)
        sheets.clear()

    def use(self, choice: random.Random, sheet: Sheet, where: str) -> None:
        """Somebody else's tensor: read, and on CUDA changed as well."""
        self.tally.check(sheet.is_right(), f"a tensor of {sheet.origin}, {where}")
        if self.is_cuda and choice.random() < 0.5:
            sheet.add(choice.randint(1, 3))

    def guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self.tally.mistake(f"{type(error).__name__}: {error}")
            faulthandler.dump_traceback(all_threads=False)
            self.stop.set()

    def report(self, seconds: float) -> dict[str, Any]:
        contexts, tally = pgk.stats().contexts, self.tally
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": torch.cuda.get_device_name(0) if self.is_cuda else "host",
            "driver": driver(),
            "torch": str(torch.__version__),
            "seconds": round(seconds, 1),
            "capacity": 32 * self.unit,
            "used": sum(context.usage.used for context in contexts),
            "wrong": len(tally.wrong),
            "mistakes": tally.wrong,
            **{name: tally.counts[name] for name in COUNTED},
            **{name: sum(getattr(context, name) for context in contexts) for name in SUMMED},
            "evictions": {context.name: context.evictions for context in contexts},
            "restores": {context.name: context.restores for context in contexts},
            "ms_until": {what: quantiles(waits) for what, waits in tally.waits.items()},
        }


class Worker:
    """The thread of one context."""

    def __init__(self, storm: Storm, number: int, seed: int) -> None:
        self.storm, self.number, self.tally = storm, number, storm.tally
        self.model = storm.models[number]
        self.context = self.model.context
        self.choice = random.Random(seed + number)
        self.ready: list[Sheet] = []  # to be handed over once they are complete
        self.side = torch.cuda.Stream() if storm.is_cuda else None

    def run(self) -> None:
        while not self.storm.stop.is_set():
            for part in (self.inside, self.outside):
                try:
                    part()
                except (torch.OutOfMemoryError, ContextBusyError) as error:
                    is_refused = isinstance(error, torch.OutOfMemoryError)
                    self.tally.count("refusals" if is_refused else "busy")
                    time.sleep(self.choice.uniform(0.001, 0.03))
                self.finish()
            if self.choice.random() < SENT_OUT[self.context.qos]:
                try:
                    self.context.evict()
                except ContextBusyError:
                    self.tally.count("busy")

    def finish(self) -> None:
        if self.storm.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.storm.hand_over(self.choice, self.ready)

    def check(self, sheet: Sheet, where: str) -> None:
        self.tally.check(sheet.is_right(), f"weights of {sheet.origin}, {where}")

    def inside(self) -> None:
        model, choice = self.model, self.choice
        if self.side is not None:
            self.side.synchronize()  # a refusal may have come before
        with ExitStack() as stack:
            with self.tally.entering():
                stack.enter_context(context_session(self.context))
            for sheet in model.weights:
                self.check(sheet, "in its session")
            for sheet in choice.sample(model.weights, 2):
                sheet.add(1)
            self.consume(f"in a session of {self.context.name}")
            loss = model.forward()
            is_done = not self.storm.is_cuda or choice.random() < 0.5
            if is_done:
                self.differentiate(loss, "in its session")
            if self.storm.is_cuda:
                self.replay("in its session")
                self.work_aside(choice.choice(model.weights))
            self.ready.append(self.storm.fresh(choice, self.context))
        if not is_done:
            self.differentiate(loss, "outside")

    def consume(self, where: str) -> None:
        if sheet := self.storm.received(self.number):
            self.storm.use(self.choice, sheet, where)
            self.ready.append(sheet)

    def differentiate(self, loss: torch.Tensor, where: str) -> None:
        loss.backward()
        self.tally.count("backwards")
        right = self.model.has_right_gradients()
        self.tally.check(right, f"gradients of {self.context.name}, {where}")

    def replay(self, where: str) -> None:
        self.tally.count("replays")
        right = self.model.replay(self.choice.randrange(3))
        self.tally.check(right, f"the graph of {self.context.name}, {where}")

    def work_aside(self, sheet: Sheet) -> None:
        """On a side stream; the session does not wait for it."""
        assert self.side is not None
        self.side.wait_stream(torch.cuda.current_stream())
        sheet.data.record_stream(self.side)
        with torch.cuda.stream(self.side):
            for _ in range(8):
                sheet.add(1)

    def outside(self) -> None:
        """Outside of sessions, while the context may be evicted or on its way."""
        self.consume("outside of sessions")
        weights = self.choice.choice(self.model.weights)
        if self.side is None:
            self.check(weights, "outside")
            return
        self.work_aside(weights)
        time.sleep(self.choice.uniform(0, 0.01))
        self.side.synchronize()
        self.check(weights, "after work on a side stream")
        weights.add(2)
        self.check(weights, "on the default stream")
        self.replay("outside")
        own = get_stream(self.context)
        assert isinstance(own, torch.cuda.Stream)
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            weights.add(1)
        own.synchronize()


async def visit(storm: Storm, seed: int) -> None:
    """One task of the event loop: in the session of one context after the other."""
    choice = random.Random(seed)
    ready: list[Sheet] = []
    while not storm.stop.is_set():
        context = choice.choice(storm.models).context
        try:
            async with AsyncExitStack() as stack:
                with storm.tally.entering():
                    session = await stack.enter_async_context(context_session(context))
                sheet = storm.received(len(TIERS)) or storm.fresh(choice, context)
                storm.use(choice, sheet, f"in a task's session of {context.name}")
                ready.append(sheet)
                await session.synchronize()
            if choice.random() < SENT_OUT[context.qos]:
                await context.evict_async()  # whose thread may be at work outside of its sessions
        except torch.OutOfMemoryError:
            storm.tally.count("refusals")
        except ContextBusyError:
            storm.tally.count("busy")
        storm.hand_over(choice, ready)
        await asyncio.sleep(choice.uniform(0.001, 0.03))


def watch(tally: Tally) -> None:
    """End the process if nobody gets on."""
    while not tally.is_over.wait(1):
        if time.monotonic() - tally.progress > HANG:
            print(f"nobody got on for {HANG:.0f} s", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(3)


def run(device: str, size: int, seconds: float, seed: int = 1) -> dict[str, Any]:
    """Storm for so long; return the report."""
    tally = Tally()
    threading.Thread(target=watch, args=(tally,), daemon=True, name="watch").start()
    storm = Storm(device, size, seed, tally)

    async def visits() -> None:
        await asyncio.gather(*(visit(storm, seed + 1000 + number) for number in range(4)))

    workers = [Worker(storm, number, seed) for number in range(len(TIERS))]
    works = {worker.context.name: worker.run for worker in workers}
    works["event loop"] = lambda: asyncio.run(visits())
    threads = []
    start = time.monotonic()
    for name, work in works.items():
        threads.append(threading.Thread(target=storm.guarded, args=(work,), name=name))
        threads[-1].start()
    while any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback_later(2 * HANG, exit=True)  # if not even `watch` gets on
        time.sleep(0.2)
        if time.monotonic() - start > seconds:
            storm.stop.set()
    faulthandler.cancel_dump_traceback_later()
    storm.models[0].context._runtime.manager.check_invariants()
    report = storm.report(time.monotonic() - start)
    tally.is_over.set()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.storm", description=__doc__)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", type=float, help="GiB of the device; 16, on the CPU a quarter")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    size = arguments.size or (16 if arguments.device == "cuda" else 0.25)
    report = run(arguments.device, int(size * GB), arguments.seconds, arguments.seed)
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.report:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(text + "\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
