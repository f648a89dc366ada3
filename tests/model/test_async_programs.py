"""Random programs of tasks, awaits, sessions and cancellations, checked after every step.

Whatever a program does, each of its parts knows which context it must be in: the interpreter hands
that down as an argument, with nothing of ours involved.
"""

import asyncio
import contextlib
import gc
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pygpukit_torch as pgk
from pygpukit_torch import MB, SessionError, context_session, event_loop, native
from tests.event_loops import LOOPS
from tests.turns import share_gate

CONTEXTS = 3
Context = pgk.ExecutionContext | None
Program = list[tuple[Any, ...]]

contexts = st.integers(0, CONTEXTS - 1)
few = st.integers(0, 4)
simple = st.one_of(
    st.tuples(st.just("await"), st.sampled_from(["nothing", "timer", "failure", "thread"])),
    st.tuples(st.just("with"), contexts, contexts),
    st.tuples(st.just("allocate"), st.integers(1, 4096)),
    st.tuples(st.just("free")),
    st.tuples(st.just("callback"), st.sampled_from(["soon", "later"])),
)


def compound(bodies: st.SearchStrategy[Program]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.one_of(
        st.tuples(st.just("session"), contexts, bodies),
        st.tuples(st.just("decorated"), contexts, bodies),
        st.tuples(st.just("generator"), contexts, few, bodies),
        st.tuples(st.just("spawn"), bodies),
        st.tuples(st.just("cancel"), few, bodies),
        st.tuples(st.just("gather"), st.lists(bodies, max_size=3)),
        st.tuples(st.just("group"), st.lists(bodies, max_size=3)),
        st.tuples(st.just("timeout"), bodies),
        st.tuples(st.just("fail"), bodies),
    )


programs = st.recursive(
    st.lists(simple, max_size=4),
    lambda bodies: st.lists(st.one_of(simple, compound(bodies)), max_size=4),
    max_leaves=25,
)


class _FailureError(Exception):
    pass


@dataclass
class Interpreter:
    """Runs a program and notes what it finds wrong, where nothing can swallow it."""

    contexts: list[pgk.ExecutionContext]
    is_limited: bool
    kept: list[tuple[pgk.ExecutionContext, torch.Tensor]] = field(default_factory=list)
    spawned: list[asyncio.Task[None]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    checks: int = 0

    def check(self, where: str, expected: Context) -> None:
        self.checks += 1
        found = pgk.current_context()
        stream = native.current_host_stream()
        if found is not expected or stream != (expected.stream.id if expected else 0):
            self.wrong.append(f"{where}: in {found} on stream {stream}, not in {expected}")
        before = [self._used(context) for context in self.contexts]
        block = torch.empty(128)
        after = [self._used(context) for context in self.contexts]
        del block
        due = [512 if context is expected else 0 for context in self.contexts]
        if [now - then for now, then in zip(after, before, strict=True)] != due:
            self.wrong.append(f"{where}: charged {before} -> {after}, in {expected}")

    @staticmethod
    def _used(context: pgk.ExecutionContext) -> int:
        return context._native.used_bytes

    async def run(self, program: Program, here: Context) -> None:
        self.check("begin", here)
        for name, *arguments in program:
            try:
                await getattr(self, f"do_{name}")(here, *arguments)
            finally:
                self.check(name, here)

    async def do_await(self, here: Context, kind: str) -> None:
        loop = asyncio.get_running_loop()
        if kind == "nothing":
            await asyncio.sleep(0)
        elif kind == "timer":
            await asyncio.sleep(0.0001)
        elif kind == "failure":
            future = loop.create_future()
            loop.call_soon(future.set_exception, _FailureError())
            try:
                await future
            except _FailureError:
                self.check("after a failure", here)
        else:
            found = await asyncio.to_thread(pgk.current_context)
            if found is not here:
                self.wrong.append(f"a thread was in {found}, not in {here}")

    async def do_with(self, here: Context, outer: int, inner: int) -> None:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(context_session(self.contexts[outer]))
            except SessionError:
                if self.is_limited:
                    return  # it would have to wait
                raise
            self.check("with", self.contexts[outer])
            with context_session(self.contexts[inner]):
                self.check("with", self.contexts[inner])
            self.check("with", self.contexts[outer])

    async def do_allocate(self, here: Context, bytes_: int) -> None:
        if here is not None:
            self.kept.append((here, torch.empty(bytes_, dtype=torch.uint8)))

    async def do_free(self, here: Context) -> None:
        if self.kept:
            self.kept.pop(len(self.kept) // 2)

    async def do_callback(self, here: Context, when: str) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        waiting = True

        def called() -> None:
            # Whoever waited may have been cancelled and have left the session: then it is over for
            # the callback, too.
            if waiting:
                self.check("callback", here)
            future.set_result(None)

        if when == "soon":
            loop.call_soon(called)
        else:
            loop.call_later(0.0001, called)
        try:
            await asyncio.shield(future)
        finally:
            waiting = False

    async def do_session(self, here: Context, index: int, body: Program) -> None:
        async with context_session(self.contexts[index]):
            await self.run(body, self.contexts[index])

    async def do_decorated(self, here: Context, index: int, body: Program) -> None:
        await context_session(self.contexts[index])(self.run)(body, self.contexts[index])

    async def do_generator(self, here: Context, index: int, count: int, body: Program) -> None:
        inside = self.contexts[index]

        async def numbers() -> AsyncIterator[int]:
            async with context_session(inside):
                for number in range(3):
                    await asyncio.sleep(0)
                    self.check("generator", inside)
                    yield number

        generator = numbers()
        try:
            async for number in generator:
                await self.run(body, inside)
                if number == count:
                    break
        finally:
            await generator.aclose()  # type: ignore[attr-defined]

    async def do_spawn(self, here: Context, body: Program) -> None:
        self.spawned.append(asyncio.create_task(self.run(body, here)))

    async def do_cancel(self, here: Context, steps: int, body: Program) -> None:
        task = asyncio.create_task(self.run(body, here))
        self.spawned.append(task)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()

    async def do_gather(self, here: Context, bodies: list[Program]) -> None:
        await asyncio.gather(*(self.run(body, here) for body in bodies))

    async def do_group(self, here: Context, bodies: list[Program]) -> None:
        async with asyncio.TaskGroup() as group:
            for body in bodies:
                group.create_task(self.run(body, here))

    async def do_timeout(self, here: Context, body: Program) -> None:
        try:
            async with asyncio.timeout(0.0003):
                await self.run(body, here)
        except TimeoutError:
            self.check("after a timeout", here)

    async def do_fail(self, here: Context, body: Program) -> None:
        try:
            await self.run(body, here)
            raise _FailureError
        except _FailureError:
            self.check("after an error", here)

    async def main(self, parts: list[Program]) -> None:
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(self.run(part, None)) for part in parts]
        await asyncio.gather(*tasks, return_exceptions=True)
        while pending := [task for task in self.spawned if not task.done()]:
            await asyncio.wait(pending)
        for task in (*tasks, *self.spawned):
            if not task.cancelled() and (error := task.exception()) is not None:
                self.wrong.append(repr(error))
        await asyncio.sleep(0)
        self.check("end", None)
        if hasattr(loop, event_loop._ATTRIBUTE) or "call_soon" in vars(loop):
            self.wrong.append("the loop is still wrapped")


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("scheduler")
def test_every_step_is_in_its_own_context(loop: str, limit: int | None) -> None:
    """Also where one task at a time may be in a session, whichever: the others wait."""
    contexts = [pgk.create_context(f"c{index}", 64 * MB) for index in range(CONTEXTS)]
    gate = share_gate(limit or 1, *contexts if limit else ())
    checks = 0

    @settings(
        max_examples=500 if loop == "asyncio" and not limit else 150,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.lists(programs, min_size=1, max_size=3))
    def interpret(parts: list[Program]) -> None:
        nonlocal checks
        interpreter = Interpreter(contexts, is_limited=limit is not None)
        LOOPS[loop](interpreter.main(parts))
        interpreter.kept.clear()
        assert not interpreter.wrong
        assert gate.open == gate.waiting == 0
        checks += interpreter.checks
        for context in contexts:
            assert context.state == "idle"
            assert context.usage().used == 0
        native_manager = pgk.runtime.get_or_initialize().manager
        native_manager.check_invariants()

    interpret()
    assert checks > 1000


# Debug mode notes where each of 200,000 steps comes from: the programs above do for it.
@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "debug"])
def test_soak(loop: str) -> None:
    """10 contexts, 200 tasks in each, 100 awaits in each: no step on a wrong stream."""
    pgk.initialize(device="cpu", total_vram=512 * MB)
    contexts = [pgk.create_context(f"c{index}", 32 * MB) for index in range(10)]
    steps = wrong = 0

    async def work(context: pgk.ExecutionContext, seed: int) -> None:
        nonlocal steps, wrong
        rng = random.Random(seed)
        for _ in range(rng.randrange(5)):
            await asyncio.sleep(0)
        async with context_session(context):
            for _ in range(100):
                kind = rng.random()
                if kind < 0.9:
                    await asyncio.sleep(0)
                elif kind < 0.97:
                    await asyncio.sleep(rng.random() / 1000)
                elif kind < 0.99:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.sleep(1), 0.0001)
                else:
                    await asyncio.create_task(asyncio.sleep(0))
                steps += 1
                wrong += (
                    pgk.current_context() is not context
                    or native.current_host_stream() != context.stream.id
                )
        wrong += pgk.current_context() is not None or native.current_host_stream() != 0

    async def main() -> None:
        tasks = [work(context, seed) for seed in range(200) for context in contexts]
        await asyncio.gather(*tasks)

    LOOPS[loop](main())
    assert wrong == 0
    assert steps == 10 * 200 * 100
    gc.collect()
    for context in contexts:
        context.destroy()
    pgk.shutdown()
