"""Sessions of asyncio tasks: whatever happens at an await, a task is in its own context."""

import asyncio
import contextvars
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    MB,
    ContextBusyError,
    ContextDestroyedError,
    ForkError,
    SessionError,
    context_session,
    event_loop,
    native,
)
from pygpukit_torch.runtime import get_or_initialize
from pygpukit_torch.session import ContextSession
from tests.event_loops import LOOPS, Run

pytestmark = pytest.mark.usefixtures("scheduler")


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run[Any]:
    loop_runner = LOOPS[request.param]

    def run_and_check(main: Coroutine[Any, Any, Any]) -> Any:
        async def checked() -> Any:
            loop = asyncio.get_running_loop()
            result = await main
            await asyncio.sleep(0)  # ends of tasks are told a step later
            wrapped = {*event_loop._SCHEDULERS, "create_task", event_loop._ATTRIBUTE}
            assert not wrapped & set(vars(loop))
            return result

        result = loop_runner(checked())
        gc.collect()
        assert here() is None
        return result

    return run_and_check


def here() -> pgk.ExecutionContext | None:
    """The current context, after checking that the stream and the charge are its own."""
    context = pgk.current_context()
    if context is None:
        assert native.current_host_stream() == 0
        before = [other.usage().used for other in pgk.list_contexts()]
        block = torch.empty(128)
        assert [other.usage().used for other in pgk.list_contexts()] == before
    else:
        assert native.current_host_stream() == context.stream.id
        used = context.usage().used
        block = torch.empty(128)
        assert context.usage().used == used + 512
    del block
    return context


async def stays(context: pgk.ExecutionContext | None, steps: int = 5) -> None:
    for step in range(steps):
        assert here() is context
        await asyncio.sleep(0.0002 if step % 3 == 2 else 0)
    assert here() is context


async def in_session(context: pgk.ExecutionContext, steps: int = 5) -> None:
    await stays(None, 2)
    async with context_session(context) as session:
        assert session.context is context
        await stays(context, steps)
    assert here() is None
    await stays(None, 2)


def test_tasks_that_take_turns(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(in_session(context, 20)) for context in [a, b] * 5]
        await asyncio.gather(*tasks, stays(None, 40))

    run(main())
    assert a.state == b.state == "idle"


def test_sessions_nest(run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext) -> None:
    async def main() -> None:
        session = context_session(a)
        async with session:
            async with context_session(b):
                await stays(b)
                async with session:
                    await stays(a)
                await stays(b)
            await stays(a)
            async with AsyncExitStack() as stack:
                for context in (b, a, b):
                    await stack.enter_async_context(context_session(context))
                    await stays(context)
            await stays(a)
        await stays(None)

    run(main())
    assert a.state == b.state == "idle"


def test_exceptions_leave_the_session(run: Run[Any], a: pgk.ExecutionContext) -> None:
    async def fail() -> None:
        async with context_session(a):
            await asyncio.sleep(0)
            raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await fail()
        await stays(None)
        results = await asyncio.gather(fail(), in_session(a), return_exceptions=True)
        assert isinstance(results[0], ZeroDivisionError)
        assert results[1] is None

    run(main())
    assert a.state == "idle"


def test_resuming_through_an_exception(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def one(context: pgk.ExecutionContext) -> None:
        loop = asyncio.get_running_loop()
        async with context_session(context):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.sleep(10), 0.001)
            assert here() is context
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.sleep(10)
            assert here() is context
            future = loop.create_future()
            loop.call_later(0.001, future.set_exception, ValueError("x"))
            with pytest.raises(ValueError, match="x"):
                await future
            assert here() is context

    async def main() -> None:
        await asyncio.gather(one(a), one(b), stays(None, 20))

    run(main())


def test_cancelling_at_every_step(run: Run[Any], a: pgk.ExecutionContext) -> None:
    """The first step is the one that the session waits for to be in the context."""

    async def main() -> None:
        for steps in range(12):
            task = asyncio.create_task(in_session(a))
            for _ in range(steps):
                await asyncio.sleep(0)
                assert here() is None
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert a.state == "idle"

    run(main())


def test_tasks_made_inside_inherit(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def child() -> None:
        await stays(a, 10)
        async with context_session(b):
            await stays(b)
        await stays(a)

    async def main() -> None:
        async with context_session(a):
            await asyncio.gather(child(), child(), asyncio.sleep(0))
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                group.create_task(child())
            async with context_session(b):
                await asyncio.gather(stays(b), in_context(b))
            await asyncio.wait_for(child(), 10)
            await asyncio.shield(child())
            variables = contextvars.copy_context()
            await asyncio.create_task(child(), context=variables)

    async def in_context(context: pgk.ExecutionContext) -> None:
        async with context_session(context):
            await stays(context)

    run(main())
    assert a.state == b.state == "idle"


def test_a_task_keeps_the_context_active_until_it_ends(
    run: Run[Any], a: pgk.ExecutionContext
) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def child() -> None:
            await stays(a)
            await go.wait()
            await stays(a)

        async with context_session(a):
            tasks = [asyncio.create_task(child()) for _ in range(3)]
            cancelled = asyncio.create_task(child())
        assert here() is None
        cancelled.cancel()
        await asyncio.wait([cancelled])
        with pytest.raises(ContextBusyError):
            a.destroy()
        go.set()
        await asyncio.gather(*tasks)
        assert here() is None
        a.destroy()

    run(main())


def test_a_thread_in_a_session_runs_its_loop_in_it(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def one() -> None:
        await stays(a)
        async with context_session(b):
            await stays(b)
        await stays(a)

    async def main() -> None:
        await asyncio.gather(one(), one(), stays(a, 20))

    def inside() -> None:
        with context_session(a):
            asyncio.run(main())
            assert here() is a

    inside()

    async def outer() -> None:
        """The loop of another thread knows nothing of this one's task, and the thread inherits."""
        async with context_session(a):
            await asyncio.to_thread(asyncio.run, main())
            await asyncio.to_thread(inside)
        async with context_session(b):
            await asyncio.to_thread(inside)

    run(outer())


def test_async_generators(run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext) -> None:
    async def numbers(context: pgk.ExecutionContext) -> AsyncIterator[int]:
        async with context_session(context):
            for number in range(3):
                await stays(context, 2)
                yield number

    async def main() -> None:
        async for _ in numbers(a):
            assert here() is a  # as with a synchronous generator: the session is this thread's too
            async with context_session(b):
                await stays(b)
        await stays(None)
        unfinished = numbers(a)
        await anext(unfinished)
        await unfinished.aclose()
        await stays(None)
        forgotten = numbers(a)
        await anext(forgotten)
        del forgotten
        gc.collect()
        await asyncio.sleep(0.01)  # the loop closes it in a task of its own
        await stays(None)

    run(main())
    assert a.state == "idle"


def test_a_forgotten_task_leaves(run: Run[Any], a: pgk.ExecutionContext) -> None:
    async def forever() -> None:
        async with context_session(a):
            await asyncio.get_running_loop().create_future()

    async def main() -> None:
        task = asyncio.create_task(forever())
        await asyncio.sleep(0.001)
        assert a.state == "active"
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task

        def is_idle() -> bool:
            gc.collect()
            return a.state == "idle"

        await until(is_idle)

    run(main())


def test_callbacks_scheduled_in_a_session_run_in_it(run: Run[Any], a: pgk.ExecutionContext) -> None:
    seen: dict[str, pgk.ExecutionContext | None] = {}

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def note(name: str) -> None:
            seen[name] = here()

        async with context_session(a):
            loop.call_soon(note, "soon")
            loop.call_soon(note, "elsewhere", context=contextvars.Context())
            loop.call_later(0.001, note, "later")
            loop.call_at(loop.time() + 0.001, note, "at")
            loop.call_soon_threadsafe(note, "threadsafe")
            await asyncio.sleep(0.01)
            loop.call_later(0.001, note, "too late")
            refused = loop.call_soon(note, "cancelled")
            refused.cancel()
        loop.call_soon(note, "outside")
        await asyncio.sleep(0.01)

    run(main())
    assert seen == {
        **dict.fromkeys(["soon", "later", "at", "threadsafe"], a),
        **dict.fromkeys(["elsewhere", "outside", "too late"]),
    }


def test_with_works_in_a_task_that_does_not_await_within(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def one(context: pgk.ExecutionContext) -> None:
        for _ in range(5):
            with context_session(context), context_session(context):
                assert here() is context
                task = asyncio.create_task(stays(context))
            assert here() is None
            await task

    async def nested() -> None:
        async with context_session(a):
            await one_in(b, a)

    async def one_in(inner: pgk.ExecutionContext, outer: pgk.ExecutionContext) -> None:
        with context_session(inner):
            assert here() is inner
        await stays(outer)

    async def main() -> None:
        await asyncio.gather(one(a), one(b), nested(), stays(None, 20))

    run(main())
    assert a.state == b.state == "idle"


@pytest.mark.parametrize("within", [False, True])
def test_with_across_an_await_is_an_error_and_harms_nobody_after(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext, within: bool
) -> None:
    async def wrong() -> None:
        with context_session(b):
            await asyncio.sleep(0)
            await stays(b)

    async def main() -> None:
        if within:
            async with context_session(a):
                with pytest.raises(SessionError, match=r"'b' .* held across an 'await'"):
                    await wrong()
                await stays(a)
        else:
            with pytest.raises(SessionError, match="use 'async with'"):
                await wrong()
        await stays(None)

    run(main())
    assert a.state == b.state == "idle"


def test_leaving_what_was_not_entered(run: Run[Any], a: pgk.ExecutionContext) -> None:
    async def main() -> None:
        with pytest.raises(SessionError, match="'a' was left by a task that had not"):
            await context_session(a).__aexit__(None, None, None)
        with pytest.raises(SessionError, match="not entered it, and no other has"):
            context_session(a).__exit__(None, None, None)

    run(main())


def test_entering_a_destroyed_context(run: Run[Any], a: pgk.ExecutionContext) -> None:
    async def main() -> None:
        session = context_session(a)
        a.destroy()
        with pytest.raises(ContextDestroyedError, match="'a' has been destroyed"):
            async with session:
                pass
        with pytest.raises(ContextDestroyedError), session:
            pass
        with pytest.raises(ContextDestroyedError):
            await session.synchronize()
        with pytest.raises(ContextDestroyedError):
            await session.to_thread(here)
        await stays(None)

    run(main())


def test_tasks_that_share_contextvars(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def main() -> None:
        shared = contextvars.copy_context()
        entered = asyncio.Event()

        async def in_a() -> None:
            async with context_session(a):
                entered.set()
                await stays(a, 10_000)

        first = asyncio.create_task(in_a(), context=shared)
        await entered.wait()
        with pytest.raises(SessionError, match=r"'b' cannot be entered: another task"):
            await asyncio.create_task(in_b(), context=shared)
        first.cancel()
        await asyncio.wait([first])
        await asyncio.create_task(in_session(b), context=shared)

        # One task after the other: a test fixture that sets up, a test, and the fixture's end.
        session = context_session(a)
        await asyncio.create_task(session.__aenter__(), context=shared)  # type: ignore[arg-type]
        await asyncio.create_task(in_b(), context=shared)
        await asyncio.create_task(
            session.__aexit__(None, None, None),  # type: ignore[arg-type]
            context=shared,
        )
        await asyncio.create_task(stays(None), context=shared)

    async def in_b() -> None:
        async with context_session(b):
            await stays(b)

    run(main())
    assert a.state == b.state == "idle"


def wrapped(loop: asyncio.AbstractEventLoop) -> bool:
    return hasattr(loop, event_loop._ATTRIBUTE) or "call_soon" in vars(loop)


def test_a_shared_session_object_and_a_forgotten_task(
    run: Run[Any], a: pgk.ExecutionContext
) -> None:
    """It is closed by the collector, in the middle of a step of another user of the object."""
    session = context_session(a)

    async def forever() -> None:
        async with session:
            await asyncio.get_running_loop().create_future()

    async def main() -> None:
        task = asyncio.create_task(forever())
        await until(lambda: a.state == "active")
        await asyncio.sleep(0.005)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        gc.disable()
        del task
        async with session:
            assert here() is a
            gc.collect()
            await stays(a)
            gc.collect()
            await stays(a)
        gc.enable()
        await stays(None)

    run(main())
    assert a.state == "idle"


def test_a_shared_session_object_and_a_forgotten_generator(
    run: Run[Any], a: pgk.ExecutionContext
) -> None:
    session = context_session(a)

    async def numbers() -> AsyncIterator[int]:
        async with session:
            yield 1

    async def forget() -> None:
        generator = numbers()
        await anext(generator)
        del generator
        gc.collect()

    async def main() -> None:
        async with session:
            await asyncio.create_task(forget())
            await asyncio.sleep(0.005)
            await stays(a)

    run(main())
    assert a.state == "idle"


def test_leaving_by_a_thread_harms_no_task(run: Run[Any], a: pgk.ExecutionContext) -> None:
    async def main() -> None:
        session = context_session(a)
        async with session:
            with pytest.raises(SessionError, match="no other has"):
                await asyncio.get_running_loop().run_in_executor(
                    None, session.__exit__, None, None, None
                )
            await stays(a)

    # Pool work that is submitted in the session has a session of its own there.
    run(main())
    assert a.state == "idle"


def test_a_generator_that_other_tasks_advance_is_told(
    run: Run[Any], a: pgk.ExecutionContext
) -> None:
    async def numbers() -> AsyncIterator[pgk.ExecutionContext | None]:
        async with context_session(a):
            for _ in range(2):
                await asyncio.sleep(0)
                yield here()

    decorated = context_session(a)(numbers_outside)

    async def main() -> None:
        generator = numbers()
        seen = []
        for _ in range(2):
            seen.append(await asyncio.create_task(anext(generator)))  # type: ignore[arg-type]
        with pytest.raises(SessionError, match="left by another task or thread"):
            await asyncio.create_task(anext(generator))  # type: ignore[arg-type]
        assert seen[0] is a
        generator = decorated()
        for _ in range(2):
            assert await asyncio.create_task(anext(generator)) is a  # type: ignore[arg-type]
        await stays(None)

    run(main())
    assert a.state == "idle"


async def numbers_outside() -> AsyncIterator[pgk.ExecutionContext | None]:
    for _ in range(2):
        await asyncio.sleep(0)
        yield here()


def test_tasks_in_variables_that_are_given_to_them(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def main() -> None:
        async with context_session(a):
            shared = contextvars.copy_context()
            async with asyncio.TaskGroup() as group:
                group.create_task(stays(a, 2), context=shared)
                group.create_task(stays(a, 30), context=shared)
                group.create_task(stays(None), context=contextvars.Context())
            await stays(a)
            mine = asyncio.create_task(stays(a, 3))
            await mine
        await stays(None)

    run(main())
    assert a.state == b.state == "idle"


def test_sessions_in_callbacks(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    seen: list[pgk.ExecutionContext | None] = []

    def callback(*_: object) -> None:
        before = here()
        with context_session(b):
            assert here() is b
        assert here() is before
        seen.append(before)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe()
        async with context_session(a):
            loop.call_soon(callback)
            loop.call_soon(callback=callback)  # type: ignore[call-arg]
            loop.call_later(0.001, callback)
            future = loop.create_future()
            future.add_done_callback(callback)
            future.set_result(None)
            loop.add_reader(reader, lambda: (callback(), loop.remove_reader(reader)))
            os.write(writer, b"x")
            await asyncio.sleep(0.02)
            assert seen == [a] * 5
            await asyncio.Task(in_session_from(a, b))  # not made by the loop
        loop.call_soon(callback)
        await asyncio.sleep(0.001)
        assert seen[5:] == [None]
        os.close(reader)
        os.close(writer)

    run(main())
    assert a.state == b.state == "idle"


async def in_session_from(outer: pgk.ExecutionContext, inner: pgk.ExecutionContext) -> None:
    await stays(outer)
    async with context_session(inner):
        await stays(inner)
    await stays(outer)


def test_a_forgotten_child_leaves_the_loop_as_it_was(
    run: Run[Any], a: pgk.ExecutionContext
) -> None:
    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        async with context_session(a):
            task = asyncio.create_task(forever())
            await asyncio.sleep(0.001)
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            del task

        def is_over() -> bool:
            gc.collect()
            return a.state == "idle" and not wrapped(asyncio.get_running_loop())

        await until(is_over)

    run(main())


def test_a_task_factory_that_takes_no_context(a: pgk.ExecutionContext) -> None:
    def make(loop: asyncio.AbstractEventLoop, coro: Any) -> Any:
        return asyncio.Task(coro, loop=loop)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(make)  # type: ignore[arg-type]
        async with context_session(a):
            await asyncio.gather(stays(a), stays(a))

    asyncio.run(main())
    assert a.state == "idle"


def test_an_entry_that_fails_leaves_nothing(run: Run[Any], a: pgk.ExecutionContext) -> None:
    device = get_or_initialize().device

    async def main() -> None:
        b = pgk.create_context("b", 4 * MB)
        async with context_session(b):
            device.hold(b.stream.id)
            pgk.record_event(b)
            device.inject_fault(1, native.Device.Call.record)
            with pytest.raises(pgk.DeviceError) as error:
                await context_session(a).__aenter__()
            assert a.state == "idle"
            assert error.value.__traceback__ is not None
            device.let_go(b.stream.id)
            await stays(b)

    run(main())


def test_a_with_across_an_await_reaches_others_for_one_turn_at_most(
    run: Run[Any], a: pgk.ExecutionContext
) -> None:
    seen = []

    async def wrong() -> None:
        with context_session(a):
            await asyncio.sleep(0.005)

    async def bystander() -> None:
        for _ in range(5):
            seen.append(pgk.current_context())
            await asyncio.sleep(0)

    async def main() -> None:
        results = await asyncio.gather(wrong(), bystander(), return_exceptions=True)
        assert isinstance(results[0], SessionError)
        # Leaving is no way to lose a cancellation.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wrong(), 0.001)

    run(main())
    assert seen[1:] == [None] * 4
    assert a.state == "idle"


def test_a_with_across_an_await_leaves_the_thread_in_its_own_session(
    a: pgk.ExecutionContext,
) -> None:
    """Of the same object: the one around the loop is not the one that is at fault."""
    session = context_session(a)

    async def wrong() -> None:
        with session:
            await asyncio.sleep(0.001)

    with session:
        with pytest.raises(SessionError, match="held across"):
            asyncio.run(wrong())
        assert here() is a
    assert here() is None
    assert a.state == "idle"


# Waiting ------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


def test_leaving_awaits_the_work_and_others_go_on(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    device = get_or_initialize().device

    async def main() -> None:
        left = []

        async def one() -> None:
            async with context_session(a):
                device.hold(a.stream.id)
                pgk.record_event(a)
            left.append(here())

        task = asyncio.create_task(one())
        await in_session(b, 20)
        assert not left
        assert a.state == "active"
        device.let_go(a.stream.id)
        await task
        assert left == [None]

    run(main())


def test_entering_waits_on_the_device_not_in_the_loop(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    device = get_or_initialize().device

    async def main() -> None:
        async with context_session(a):
            device.hold(a.stream.id)
            pgk.record_event(a)
            inside = context_session(b)
            await inside.__aenter__()
            assert here() is b
            event = pgk.record_event(b)
            assert not event.query()
            device.let_go(a.stream.id)
            assert event.query()
            await inside.__aexit__(None, None, None)

    run(main())


def test_cancelled_while_it_leaves(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    """It is left all the same, and what comes after waits on the device."""
    device = get_or_initialize().device

    async def main() -> None:
        async def one() -> None:
            async with context_session(b):
                try:
                    async with context_session(a):
                        device.hold(a.stream.id)
                        pgk.record_event(a)
                finally:
                    assert here() is b
                    event = pgk.record_event(b)
                    assert not event.query()
                    device.let_go(a.stream.id)
                    assert event.query()

        task = asyncio.create_task(one())
        await until(lambda: not a.stream.query())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert a.state == b.state == "idle"


@pytest.mark.parametrize("what", ["session", "stream", "event"])
def test_waiting_for_the_device(run: Run[Any], a: pgk.ExecutionContext, what: str) -> None:
    device = get_or_initialize().device

    async def main() -> None:
        session = context_session(a)
        await session.synchronize()  # nothing to wait for
        device.hold(a.stream.id)
        event = pgk.record_event(a)
        target = {"session": None, "stream": a.stream, "event": event}[what]
        waits = [asyncio.create_task(session.synchronize(target)) for _ in range(3)]
        waits[0].cancel()
        await stays(None, 10)
        assert not waits[1].done()
        device.let_go(a.stream.id)
        await asyncio.gather(*waits[1:])
        assert event.query()

    run(main())


def test_waiting_for_what_cannot_be_waited_for(run: Run[Any], a: pgk.ExecutionContext) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="expected a stream or an event, got str"):
            await context_session(a).synchronize("a")  # type: ignore[arg-type]

    run(main())


def test_a_device_that_fails_while_it_is_waited_for(run: Run[Any], a: pgk.ExecutionContext) -> None:
    device = get_or_initialize().device

    async def main() -> None:
        session = context_session(a)

        async def one() -> None:
            async with session:
                device.hold(a.stream.id)
                pgk.record_event(a)
                device.inject_fault(1, native.Device.Call.notify)
                # Leaving then waits in this thread: on the host device nothing else can.
                threading.Timer(0.05, device.let_go, [a.stream.id]).start()

        with pytest.raises(pgk.DeviceError, match="notify failed: injected fault"):
            await one()
        await stays(None)
        device.inject_fault(1, native.Device.Call.record)
        with pytest.raises(pgk.DeviceError, match="record failed"):
            await session.synchronize()

    run(main())
    assert a.state == "idle"


def test_an_alarm_that_stays_silent_is_no_dead_end(run: Run[Any]) -> None:
    """A device that has failed may never ring."""

    async def main() -> None:
        asked = 0

        def is_done() -> bool:
            nonlocal asked
            asked += 1
            if asked == 3:
                raise pgk.DeviceError("gone")
            return False

        with pytest.raises(pgk.DeviceError, match="gone"):
            await event_loop.wait(is_done, lambda alarm: None)

    run(main())


# Threads ------------------------------------------------------------------------------------------


def in_thread() -> pgk.ExecutionContext | None:
    """Check the stream only: other threads allocate in the same contexts."""
    context = pgk.current_context()
    assert native.current_host_stream() == (context.stream.id if context else 0)
    return context


def test_threads_of_a_task_are_in_its_context(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    variable = contextvars.ContextVar("variable", default=0)

    def work(x: int, *, y: int) -> tuple[Any, int, int]:
        return in_thread(), x + y, variable.get()

    async def one(own: pgk.ExecutionContext, other: pgk.ExecutionContext) -> None:
        async with context_session(own) as session:
            variable.set(7)
            assert await session.to_thread(work, 1, y=2) == (own, 3, 7)
            assert await context_session(other).to_thread(work, 1, y=2) == (other, 3, 7)
            assert (await asyncio.to_thread(work, 1, y=2))[0] is own
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, in_thread) is own
            assert here() is own

    async def main() -> None:
        await asyncio.gather(one(a, b), one(b, a))
        assert (await context_session(a).to_thread(work, 1, y=2))[0] is a
        with pytest.raises(ZeroDivisionError):
            await context_session(a).to_thread(divmod, 1, 0)
        assert (await asyncio.to_thread(in_thread)) is None

    run(main())
    assert a.state == b.state == "idle"


def test_a_thread_keeps_the_context_active_though_nobody_waits(
    run: Run[Any], a: pgk.ExecutionContext
) -> None:
    go = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(context_session(a).to_thread(go.wait))
        await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        with pytest.raises(ContextBusyError):
            a.destroy()
        go.set()
        await until(lambda: a.state == "idle")
        a.destroy()

    run(main())


def test_a_coroutine_handed_to_the_loop_of_another_thread(
    run: Run[Any], a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        def elsewhere() -> None:
            asyncio.run_coroutine_threadsafe(in_session(b), loop).result(10)

        with pytest.raises(SessionError, match="take a running asyncio event loop"):
            await asyncio.to_thread(lambda: drive(context_session(a).__aenter__()))
        await asyncio.gather(asyncio.to_thread(elsewhere), in_session(a, 20))

    run(main())


def drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine as frameworks do that are not asyncio."""
    try:
        while True:
            coroutine.send(None)
    except StopIteration as end:
        return end.value


def test_a_forked_child_has_no_session_left(run: Run[Any], a: pgk.ExecutionContext) -> None:
    async def main() -> None:
        async with context_session(a):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    ok = native.current_context() is None and native.current_host_stream() == 0
                    torch.empty(MB)
                    try:
                        pgk.current_context()
                    except ForkError:
                        code = 0 if ok else 2
                finally:
                    os._exit(code)
            assert here() is a
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0

    run(main())
    assert a.state == "idle"


# Loops --------------------------------------------------------------------------------------------


def test_without_a_loop(a: pgk.ExecutionContext) -> None:
    with pytest.raises(SessionError, match="take a running asyncio event loop"):
        drive(context_session(a).__aenter__())
    with pytest.raises(SessionError):
        drive(context_session(a).to_thread(here))
    assert a.state == "idle"


def test_a_loop_whose_methods_cannot_be_wrapped(a: pgk.ExecutionContext) -> None:
    class Rigid(asyncio.SelectorEventLoop):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "call_soon":
                raise AttributeError("read-only")
            super().__setattr__(name, value)

    async def main() -> None:
        with pytest.raises(SessionError, match=r"tasks of Rigid, .* cannot be wrapped: read-only"):
            await in_session(a)
        assert here() is None

    with asyncio.Runner(loop_factory=Rigid) as runner:
        runner.run(main())
    assert a.state == "idle"


def test_a_loop_whose_last_method_cannot_be_wrapped(a: pgk.ExecutionContext) -> None:
    class Rigid(asyncio.SelectorEventLoop):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "create_task":
                raise AttributeError("read-only")
            super().__setattr__(name, value)

    async def main() -> None:
        with pytest.raises(SessionError, match="cannot be wrapped: read-only"):
            await in_session(a)
        assert not wrapped(asyncio.get_running_loop())

    with asyncio.Runner(loop_factory=Rigid) as runner:
        runner.run(main())
    assert a.state == "idle"


def test_a_loop_that_runs_itself_from_within_a_step(a: pgk.ExecutionContext) -> None:
    async def main() -> None:
        asyncio.get_running_loop()._nest_patched = True  # type: ignore[attr-defined]
        with pytest.raises(SessionError, match="nest_asyncio"):
            await in_session(a)

    asyncio.run(main())
    assert a.state == "idle"


def test_a_loop_that_another_thread_goes_on_with(a: pgk.ExecutionContext) -> None:
    loop = asyncio.new_event_loop()
    errors: list[BaseException] = []

    async def one() -> None:
        async with context_session(a):
            await asyncio.sleep(0.01)
            assert pgk.current_context() is None

    task = loop.create_task(one())
    loop.run_until_complete(asyncio.sleep(0.001))

    def go_on() -> None:
        try:
            loop.run_until_complete(task)
        except SessionError as error:
            errors.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    loop.close()
    assert "left by another task or thread" in str(errors[0])
    assert a.state == "idle"


def test_a_loop_that_runs_its_tasks_in_another_way(a: pgk.ExecutionContext) -> None:
    class Facade:
        """What a task is told its loop is: it schedules past the loop's own methods."""

        def __init__(self, loop: asyncio.SelectorEventLoop) -> None:
            self._loop = loop

        def call_soon(self, *args: Any, **kwargs: Any) -> Any:
            return type(self._loop).call_soon(self._loop, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loop, name)

    def make_task(loop: Any, coro: Any, **options: Any) -> Any:
        return asyncio.Task(coro, loop=Facade(loop), **options)  # type: ignore[arg-type]

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(make_task)
        task = asyncio.create_task(in_session(a))
        await until(task.done)
        with pytest.raises(SessionError, match=r"does not run their steps by call_soon\(\)"):
            task.result()
        assert here() is None

    asyncio.run(main())
    assert a.state == "idle"


def test_a_loop_that_somebody_else_wraps(a: pgk.ExecutionContext, b: pgk.ExecutionContext) -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        calls = 0

        def counting(own: Any) -> Any:
            def call_soon(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                return own(*args, **kwargs)

            return call_soon

        inner = loop.call_soon = counting(loop.call_soon)
        await in_session(a)
        assert calls > 0
        assert loop.call_soon is inner
        async with context_session(a):
            outer = loop.call_soon = counting(loop.call_soon)
            await stays(a)
        assert loop.call_soon is outer
        await asyncio.gather(in_session(a), in_session(b))
        assert loop.call_soon is outer

    asyncio.run(main())


# Decorators ---------------------------------------------------------------------------------------


def test_functions(a: pgk.ExecutionContext) -> None:
    @context_session(a)
    def add(x: int, y: int = 1) -> int:
        """Add."""
        assert here() is a
        return x + y

    assert add(2, y=3) == 5
    assert add.__name__ == "add"
    assert add.__doc__ == "Add."
    assert here() is None
    answer = context_session(a)(lambda: answer_later())

    async def answer_later() -> Any:
        await asyncio.sleep(0)
        return here()

    assert asyncio.run(answer()) is a
    assert list(context_session(a)(lambda: iter_here())()) == [a, a]
    with pytest.raises(TypeError, match="decorates callables, got int"):
        context_session(a)(3)  # type: ignore[arg-type]


def iter_here() -> Any:
    yield here()
    yield here()


def test_generators(a: pgk.ExecutionContext) -> None:
    log: list[Any] = []

    @context_session(a)
    def steps(count: int) -> Any:
        try:
            for number in range(count):
                assert here() is a
                try:
                    log.append((yield number))
                except ValueError as error:
                    log.append(error)
            return "end"
        finally:
            log.append(here())

    generator = steps(3)
    assert next(generator) == 0
    assert here() is None
    assert generator.send("x") == 1
    error = ValueError()
    assert generator.throw(error) == 2
    with pytest.raises(StopIteration) as end:
        next(generator)
    assert end.value.value == "end"
    assert log == ["x", error, None, a]
    generator = steps(3)
    next(generator)
    generator.close()
    assert log[-1] is a
    assert a.state == "idle"


def test_coroutines_and_asynchronous_generators(run: Run[Any], a: pgk.ExecutionContext) -> None:
    log: list[Any] = []

    @context_session(a)
    async def add(x: int, y: int) -> int:
        await stays(a)
        return x + y

    @context_session(a)
    async def steps(count: int) -> Any:
        try:
            for number in range(count):
                await stays(a, 2)
                try:
                    log.append((yield number))
                except ValueError as error:
                    log.append(error)
        finally:
            await stays(a, 2)
            log.append(here())

    async def main() -> None:
        assert await asyncio.gather(add(1, 2), add(3, y=4), stays(None)) == [3, 7, None]
        async for _ in steps(2):
            await stays(None)
        assert log == [None, None, a]
        generator = steps(3)
        assert await anext(generator) == 0
        assert await generator.asend("x") == 1
        error = ValueError()
        assert await generator.athrow(error) == 2
        await stays(None)
        await generator.aclose()
        assert log[3:] == ["x", error, a]
        assert here() is None

    run(main())
    assert a.state == "idle"


def test_nobody_evicts_a_context_between_its_turn_and_its_entry(
    run: Run[Any], a: pgk.ExecutionContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry would bring it back, and the loop would stand still meanwhile."""
    begin = ContextSession._begin_in_task
    refused = []

    def evicted_just_before(self: ContextSession, *args: Any) -> Any:
        try:
            self.context.evict()
        except pgk.ContextBusyError as error:
            refused.append(str(error))
        return begin(self, *args)

    monkeypatch.setattr(ContextSession, "_begin_in_task", evicted_just_before)

    async def main() -> None:
        async with context_session(a):
            torch.ones(1000)
        a.evict()  # and from host memory
        async with context_session(a):
            torch.ones(1000)

    run(main())
    assert len(refused) == 2
    assert a.state == "idle"
