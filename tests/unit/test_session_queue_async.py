"""Limited sessions of tasks: they wait without holding up the loop, and however they end, the next
one is let in."""

import asyncio
import contextlib
import gc
import os
import random
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import uvloop

import pygpukit_torch as pgk
from pygpukit_torch import (
    MB,
    ContextDestroyedError,
    QoSPolicy,
    SessionError,
    SessionTimeoutError,
    context_session,
    event_loop,
    native,
)
from tests.event_loops import LOOPS, Run
from tests.turns import (
    PATIENCE,
    Occupant,
    background,
    is_free,
    share_gate,
    until,
    wait_until,
    waiting,
)


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run[Any]:
    loop_runner = LOOPS[request.param]

    def run_and_check(main: Coroutine[Any, Any, Any]) -> Any:
        async def checked() -> Any:
            loop = asyncio.get_running_loop()
            result = await asyncio.wait_for(main, PATIENCE)
            await asyncio.sleep(0)
            wrapped = {*event_loop._SCHEDULERS, "create_task", event_loop._ATTRIBUTE}
            assert not wrapped & set(vars(loop))
            return result

        return loop_runner(checked())

    return run_and_check


@pytest.fixture
def one(scheduler: None) -> pgk.ExecutionContext:
    return pgk.create_context("one", 8 * MB, max_sessions=1)


@pytest.fixture
def tiers(scheduler: None) -> dict[str, pgk.ExecutionContext]:
    return {
        policy.value: pgk.create_context(policy.value, 8 * MB, qos=policy) for policy in QoSPolicy
    }


async def enter(context: pgk.ExecutionContext, **options: Any) -> None:
    async with context_session(context, **options):
        assert pgk.current_context() is context
        await asyncio.sleep(0)
        assert pgk.current_context() is context
    assert pgk.current_context() is None


def enter_by_thread(context: pgk.ExecutionContext) -> None:
    with context_session(context, timeout=0):
        assert pgk.current_context() is context


def occupied(context: pgk.ExecutionContext) -> Occupant:
    return Occupant(context).enter()


class Holder:
    """A task of this loop that is in a session until it is told to leave."""

    def __init__(self, context: pgk.ExecutionContext) -> None:
        self._context = context
        self._go = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with context_session(self._context):
            await self._go.wait()

    async def leave(self) -> None:
        self._go.set()
        await self.task


def test_tasks_take_turns(run: Run[Any], scheduler: None) -> None:
    context = pgk.create_context("two", 8 * MB, max_sessions=2)
    inside = most = 0

    async def work() -> None:
        nonlocal inside, most
        async with context_session(context):
            inside += 1
            most = max(most, inside)
            for _ in range(3):
                await asyncio.sleep(0)
                assert pgk.current_context() is context
            inside -= 1

    async def main() -> None:
        await asyncio.gather(*(work() for _ in range(20)))

    run(main())
    assert most == 2
    assert is_free(context)
    assert context.state == "idle"


def test_the_loop_goes_on_while_tasks_wait(run: Run[Any], one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        occupant = occupied(one)
        task = asyncio.create_task(enter(one))
        await until(lambda: waiting(one) == 1)
        assert one.state == "active"
        assert pgk.current_context() is None
        other = pgk.create_context("other", 8 * MB)
        await enter(other)
        assert not task.done()
        occupant.leave()
        await task

    run(main())
    assert is_free(one)


def test_threads_and_tasks_of_several_loops_in_one_queue(
    run: Run[Any], tiers: dict[str, pgk.ExecutionContext]
) -> None:
    gate = share_gate(1, *tiers.values())
    order: list[str] = []

    async def come(name: str) -> None:
        async with context_session(tiers[name.split()[0]]):
            order.append(name)

    def come_by_thread(name: str) -> None:
        with context_session(tiers[name.split()[0]]):
            order.append(name)

    async def main() -> None:
        occupant = occupied(tiers["best_effort"])
        tasks: list[asyncio.Task[None]] = []
        threads = []
        for number in range(18):
            name = f"{list(tiers)[number % 3]} {number}"
            if number % 2:
                tasks.append(asyncio.create_task(come(name)))
            elif number % 4:
                threads.append(background(come_by_thread, name))
            else:
                threads.append(background(asyncio.run, come(name)))
            await until(lambda number=number: gate.waiting == number + 1)
        assert not order
        occupant.leave()
        await asyncio.gather(*tasks)
        for thread in threads:
            await asyncio.wrap_future(thread)

    run(main())
    assert order == sorted(order, key=lambda name: (list(tiers).index(name.split()[0]), 0))
    for tier in tiers:
        numbers = [int(name.split()[1]) for name in order if name.startswith(tier)]
        assert numbers == sorted(numbers)
    assert len(order) == 18
    assert gate.open == gate.waiting == 0


def test_what_is_entered_within_takes_no_slot(run: Run[Any], one: pgk.ExecutionContext) -> None:
    other = pgk.create_context("other", 8 * MB)
    gate = share_gate(1, one, other)

    async def child() -> None:
        async with context_session(other, timeout=0), context_session(one, timeout=0):
            assert pgk.current_context() is one
        with context_session(one):
            assert pgk.current_context() is one

    async def main() -> None:
        session = context_session(one, timeout=0)
        async with session:
            outsider = Occupant(other)
            await until(lambda: gate.waiting == 1)
            async with context_session(other, timeout=0), session:
                assert gate.open == 1
                with session, context_session(other):
                    assert pgk.current_context() is other
            await asyncio.gather(child(), asyncio.create_task(child()))
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
            await asyncio.to_thread(enter_by_thread, one)
            assert await session.to_thread(pgk.current_context) is one
            assert not outsider.is_in
            assert gate.open == 1
        await until(lambda: outsider.is_in)
        outsider.leave()

    run(main())
    assert is_free(one)


def test_a_task_that_outlives_the_session_waits_like_anybody(
    run: Run[Any], one: pgk.ExecutionContext
) -> None:
    async def child(go: asyncio.Event) -> None:
        await enter_within(0)
        await go.wait()
        assert pgk.current_context() is one
        with pytest.raises(SessionTimeoutError):
            await enter_within(0)
        with pytest.raises(SessionError, match="use 'async with'"), context_session(one):
            pass
        await enter_within(None)

    async def enter_within(timeout: float | None) -> None:
        async with context_session(one, timeout=timeout):
            assert pgk.current_context() is one

    async def main() -> None:
        go = asyncio.Event()
        async with context_session(one):
            task = asyncio.create_task(child(go))
            await asyncio.sleep(0.001)
        occupant = occupied(one)
        go.set()
        await until(lambda: waiting(one) == 1)
        occupant.leave()
        await task

    run(main())
    assert is_free(one)
    assert one.state == "idle"


def test_a_loop_within_a_threads_session(run: Run[Any], one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        async with context_session(one, timeout=0):
            with context_session(one):
                assert pgk.current_context() is one

    with context_session(one):
        run(main())
        assert not is_free(one)
    assert is_free(one)


def test_with_does_not_block_a_running_loop(run: Run[Any], one: pgk.ExecutionContext) -> None:
    @context_session(one)
    def decorated() -> None:
        raise AssertionError("it is not its turn")

    async def main() -> None:
        with context_session(one):  # in the task's first step, and later on
            assert not is_free(one)
        assert is_free(one)
        await asyncio.sleep(0)
        with context_session(one), context_session(one):
            assert not is_free(one)
        assert is_free(one)
        occupant = occupied(one)
        for attempt in (context_session(one).__enter__, decorated):
            with pytest.raises(
                SessionError,
                match=r"^context 'one' cannot be entered by 'with' now: waiting for its turn would "
                r"block the running event loop \(context 'one': 1 of 1 sessions open, 0 others "
                r"waiting\); use 'async with'$",
            ) as caught:
                attempt()
            assert not isinstance(caught.value, SessionTimeoutError)
        with pytest.raises(SessionTimeoutError), context_session(one, timeout=0):
            pass
        assert waiting(one) == 0
        async with context_session(pgk.create_context("other", 8 * MB)):
            with pytest.raises(SessionError, match="use 'async with'"), context_session(one):
                pass
        occupant.leave()

    run(main())
    assert is_free(one)


# However they end --------------------------------------------------------------------------------


def test_a_turn_that_does_not_come_in_time(run: Run[Any], one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        occupant = occupied(one)
        other = asyncio.create_task(enter(one))
        await until(lambda: waiting(one) == 1)
        for timeout in (0.01, 0):
            with pytest.raises(
                SessionTimeoutError,
                match=rf"within {timeout} s \(context 'one': 1 of 1 sessions open, 1 others wait",
            ):
                await enter(one, timeout=timeout)
        assert waiting(one) == 1
        with pytest.raises(SessionTimeoutError):
            await context_session(one, timeout=0.01).to_thread(int)
        assert waiting(one) == 1
        occupant.leave()
        await other
        await enter(one, timeout=PATIENCE)

    run(main())
    assert is_free(one)


def test_timeouts_from_around(run: Run[Any], one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        occupant = occupied(one)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.005):
                await enter(one)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(enter(one), 0.005)
        assert waiting(one) == 0
        occupant.leave()
        await asyncio.wait_for(enter(one), PATIENCE)

    run(main())
    assert is_free(one)


def test_cancelled_while_it_waits(run: Run[Any], one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        occupant = occupied(one)
        tasks = [asyncio.create_task(enter(one)) for _ in range(3)]
        await until(lambda: waiting(one) == 3)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert waiting(one) == 2
        occupant.leave()
        await asyncio.gather(*tasks[1:])

    run(main())
    assert is_free(one)


def test_cancelled_when_it_has_just_been_let_in(run: Run[Any], one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        occupant = occupied(one)
        first, second = (asyncio.create_task(enter(one)) for _ in range(2))
        await until(lambda: waiting(one) == 2)
        occupant.leave()
        assert waiting(one) == 1  # the first has the slot, and has not run since
        first.cancel()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first

    run(main())
    assert is_free(one)


def test_cancelling_at_every_step(run: Run[Any], one: pgk.ExecutionContext) -> None:
    """While it waits, when it is let in, in its first step in the context, inside, as it leaves."""

    async def main() -> None:
        for steps in range(24):
            holder = Holder(one)
            await until(lambda: one.state == "active")
            first, second = (asyncio.create_task(enter(one)) for _ in range(2))
            for step in range(steps):
                if step == 6:
                    await holder.leave()
                await asyncio.sleep(0)
            first.cancel()
            await holder.leave()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            await second
            assert is_free(one)
            assert one.state == "idle"

    run(main())


def test_closed_and_forgotten_while_they_wait(run: Run[Any], one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        occupant = occupied(one)
        coroutine = enter(one)
        coroutine.send(None)
        assert waiting(one) == 1
        coroutine.close()
        assert waiting(one) == 0
        context_session(one).__aenter__().close()  # never begun
        task = asyncio.create_task(enter(one))
        await until(lambda: waiting(one) == 1)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task

        def is_gone() -> bool:
            gc.collect()
            return waiting(one) == 0

        # The loop itself lets go of it when nothing rings for it.
        last = asyncio.create_task(enter(one))
        occupant.leave()
        await last
        await until(is_gone)

    run(main())
    assert is_free(one)


def test_a_loop_that_is_closed_while_its_tasks_wait(one: pgk.ExecutionContext) -> None:
    with Occupant(one):
        for make_loop in (asyncio.new_event_loop, uvloop.new_event_loop):
            loop = make_loop()
            task = loop.create_task(enter(one))
            loop.run_until_complete(asyncio.sleep(0.001))
            assert waiting(one) == 1
            loop.close()
            task._log_destroy_pending = False
            del task, loop
            gc.collect()
            assert waiting(one) == 0
    assert is_free(one)


def test_a_loop_that_stops_while_its_tasks_wait(one: pgk.ExecutionContext) -> None:
    """asyncio.run cancels them."""

    async def main() -> None:
        task = asyncio.create_task(enter(one))
        await until(lambda: waiting(one) == 1)
        assert not task.done()

    with Occupant(one):
        asyncio.run(main())
        assert waiting(one) == 0
    assert is_free(one)


def test_destroying_refuses_who_waits(
    run: Run[Any], tiers: dict[str, pgk.ExecutionContext]
) -> None:
    gate = share_gate(1, *tiers.values())
    going, staying = tiers["guaranteed"], tiers["burstable"]

    async def main() -> None:
        occupant = occupied(staying)
        tasks = [asyncio.create_task(enter(going)) for _ in range(3)]
        other = asyncio.create_task(enter(staying))
        await until(lambda: gate.waiting == 4)
        going.destroy()
        for task in tasks:
            with pytest.raises(ContextDestroyedError, match="'guaranteed' has been destroyed"):
                await task
        # Also whoever has been let in and is not there yet.
        late = tiers["best_effort"]
        task = asyncio.create_task(enter(late))
        await until(lambda: gate.waiting == 2)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        occupant.leave()
        assert (gate.open, gate.waiting) == (1, 0)
        late.destroy()
        with pytest.raises(ContextDestroyedError, match="'best_effort' has been destroyed"):
            await task

    run(main())
    assert gate.open == gate.waiting == 0


def test_coming_back_begins_with_the_turn(
    run: Run[Any], tiers: dict[str, pgk.ExecutionContext]
) -> None:
    gate = share_gate(1, *tiers.values())
    out, other = tiers["burstable"], tiers["best_effort"]
    device = pgk.runtime.get_or_initialize().device
    with context_session(out):
        tensor = torch.ones(MB, dtype=torch.uint8)
    out.evict()

    async def main() -> None:
        occupant = occupied(other)
        task = asyncio.create_task(enter(out))
        await until(lambda: gate.waiting == 1)
        assert out.usage().evicted > 0
        occupant.leave()
        await task
        assert out.usage().evicted == 0
        await until(lambda: out.state == "idle")
        # It fails: the next one is let in, and the one after that tries again.
        out.evict()
        device.inject_fault(1, native.Device.Call.move)
        results = await asyncio.gather(enter(out), enter(other), enter(out), return_exceptions=True)
        assert isinstance(results[0], pgk.DeviceError)
        assert results[1:] == [None, None]

    run(main())
    assert tensor.eq(1).all()
    assert gate.open == gate.waiting == 0


def test_cancelled_while_it_comes_back(
    run: Run[Any], tiers: dict[str, pgk.ExecutionContext]
) -> None:
    gate = share_gate(1, *tiers.values())
    out, other = tiers["burstable"], tiers["best_effort"]
    device = pgk.runtime.get_or_initialize().device
    with context_session(out):
        tensor = torch.ones(MB, dtype=torch.uint8)
    out.evict()

    async def main() -> None:
        # Whoever moves waits for the context's stream first.
        device.hold(out.stream.id)
        event = pgk.record_event(out)
        task = asyncio.create_task(enter(out))
        next_one = asyncio.create_task(enter(other))
        await until(lambda: gate.open == 1 and gate.waiting == 1)
        for _ in range(5):
            await asyncio.sleep(0.001)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await next_one
        assert gate.open == 0
        device.let_go(out.stream.id)
        assert event.query()
        await enter(out)

    run(main())
    assert tensor.eq(1).all()
    assert is_free(out)


# More ways to use it -----------------------------------------------------------------------------


def test_decorated_coroutines_and_generators(run: Run[Any], one: pgk.ExecutionContext) -> None:
    @context_session(one)
    async def add(x: int, y: int) -> int:
        assert not is_free(one)
        await asyncio.sleep(0)
        return x + y

    @context_session(one)
    async def steps(count: int) -> AsyncIterator[int]:
        for number in range(count):
            assert not is_free(one)
            await asyncio.sleep(0)
            yield number

    async def main() -> None:
        assert await asyncio.gather(add(1, 2), add(3, 4), add(5, 6)) == [3, 7, 11]
        found = []
        async for number in steps(3):
            assert is_free(one)
            found.append((number, await add(number, 1)))
        assert found == [(0, 1), (1, 2), (2, 3)]
        generator = steps(3)
        assert await anext(generator) == 0
        occupant = occupied(one)
        advanced = asyncio.create_task(anext(generator))  # type: ignore[arg-type]
        await until(lambda: waiting(one) == 1)
        occupant.leave()
        assert await advanced == 1
        await generator.aclose()  # type: ignore[attr-defined]

    run(main())
    assert is_free(one)


def test_to_thread_takes_a_thread_when_it_is_its_turn(
    run: Run[Any], one: pgk.ExecutionContext
) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        session = context_session(one)
        occupant = occupied(one)
        tasks = [asyncio.create_task(session.to_thread(pgk.current_context)) for _ in range(3)]
        await until(lambda: waiting(one) == 3)
        assert await asyncio.to_thread(int) == 0
        tasks[0].cancel()
        await until(lambda: waiting(one) == 2)
        occupant.leave()
        assert await asyncio.gather(*tasks[1:]) == [one, one]

    run(main())
    assert is_free(one)


def test_a_call_that_is_cancelled_in_the_pool_gives_the_slot_back(
    run: Run[Any], one: pgk.ExecutionContext
) -> None:
    called = []

    async def main() -> None:
        go = threading.Event()
        pool = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(pool)
        pool.submit(go.wait, PATIENCE)
        task = asyncio.create_task(context_session(one).to_thread(called.append, 1))
        await asyncio.sleep(0.001)
        assert not is_free(one)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_free(one)
        go.set()
        await context_session(one).to_thread(called.append, 2)

    run(main())
    assert called == [2]
    wait_until(lambda: one.state == "idle")


def test_thousands_wait_on_one_file(run: Run[Any], one: pgk.ExecutionContext) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        occupant = occupied(one)
        before = files()
        tasks = [asyncio.create_task(enter(one)) for _ in range(1500)]
        await until(lambda: waiting(one) == 1500)
        assert files() <= before + 2
        occupant.leave()
        await asyncio.gather(*tasks)
        assert files() <= before

    run(main())
    assert is_free(one)


def test_without_a_loop_that_can_be_followed(one: pgk.ExecutionContext) -> None:
    async def main() -> None:
        asyncio.get_running_loop()._nest_patched = True  # type: ignore[attr-defined]
        with pytest.raises(SessionError, match="nest_asyncio"):
            await enter(one)

    with pytest.raises(SessionError, match="take a running asyncio event loop"):
        context_session(one).__aenter__().send(None)
    assert is_free(one)
    asyncio.run(main())
    with Occupant(one):
        with pytest.raises(SessionError, match="take a running asyncio event loop"):
            context_session(one).__aenter__().send(None)
        asyncio.run(main())
        assert waiting(one) == 0
    assert is_free(one)


# All together ------------------------------------------------------------------------------------


def test_threads_and_tasks_that_come_and_go(
    run: Run[Any], tiers: dict[str, pgk.ExecutionContext]
) -> None:
    """With time limits, cancellations and nested sessions: never too many, and none is lost."""
    contexts = [*tiers.values(), pgk.create_context("own", 8 * MB, max_sessions=2)]
    gate = share_gate(3, *contexts)
    inside = most = 0
    counting = threading.Lock()

    @contextlib.contextmanager
    def counted() -> Any:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
        try:
            yield
        finally:
            with counting:
                inside -= 1

    def by_thread(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            first, second = rng.choices(contexts, k=2)
            timeout = rng.choice([None, 0.001])
            with contextlib.suppress(SessionTimeoutError), context_session(first, timeout=timeout):
                with counted(), context_session(second):
                    assert pgk.current_context() is second
                assert pgk.current_context() is first

    async def by_task(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            first, second = rng.choices(contexts, k=2)
            timeout = rng.choice([None, 0.001])
            with contextlib.suppress(SessionTimeoutError):
                async with context_session(first, timeout=timeout):
                    with counted():
                        async with context_session(second):
                            await asyncio.sleep(rng.choice([0, 0.0003]))
                            assert pgk.current_context() is second
                    assert pgk.current_context() is first
            assert pgk.current_context() is None

    async def main() -> None:
        rng = random.Random(0)
        threads = [background(by_thread, seed) for seed in range(4)]
        tasks = [asyncio.create_task(by_task(seed)) for seed in range(40)]
        for task in tasks[:20]:
            await asyncio.sleep(rng.random() / 500)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)
        for thread in threads:
            await asyncio.wrap_future(thread)

    run(main())
    assert most == 3
    assert gate.open == gate.waiting == 0
    assert all(is_free(context) and context.state == "idle" for context in contexts)
