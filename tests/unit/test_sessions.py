"""Which context a thread works in: nesting, threads, order of leaving, ends of threads."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import pygpukit_torch as pgk
from pygpukit_torch import MB, ContextBusyError, ContextDestroyedError, SessionError, native
from pygpukit_torch.runtime import get_or_initialize

pytestmark = pytest.mark.usefixtures("scheduler")


def test_sessions_nest(a: pgk.ExecutionContext, b: pgk.ExecutionContext) -> None:
    assert pgk.current_context() is None
    with pgk.context_session(a) as session:
        assert session.context is a
        assert pgk.current_context() is a
        with pgk.context_session(b):
            assert pgk.current_context() is b
            with pgk.context_session(a):
                assert pgk.current_context() is a
            assert pgk.current_context() is b
        assert pgk.current_context() is a
    assert pgk.current_context() is None


def test_a_session_object_is_reentrant(a: pgk.ExecutionContext, b: pgk.ExecutionContext) -> None:
    session = pgk.context_session(a)
    with session, pgk.context_session(b), session:
        assert pgk.current_context() is a
    assert pgk.current_context() is None
    with session:
        assert pgk.current_context() is a


def test_an_exception_leaves_the_session(a: pgk.ExecutionContext) -> None:
    with pytest.raises(ZeroDivisionError), pgk.context_session(a):
        _ = 1 / 0
    assert pgk.current_context() is None
    assert a.state == "idle"


def test_sessions_may_end_out_of_order(a: pgk.ExecutionContext, b: pgk.ExecutionContext) -> None:
    def steps(context: pgk.ExecutionContext) -> Iterator[None]:
        with pgk.context_session(context):
            yield

    first, second = steps(a), steps(b)
    next(first)
    next(second)
    assert pgk.current_context() is b
    assert next(first, "done") == "done"
    assert pgk.current_context() is b
    assert next(second, "done") == "done"
    assert pgk.current_context() is None


def test_one_session_object_serves_many_threads(a: pgk.ExecutionContext) -> None:
    session = pgk.context_session(a)
    together = threading.Barrier(4)

    def work() -> None:
        assert pgk.current_context() is None
        with session:
            together.wait()
            assert pgk.current_context() is a
        assert pgk.current_context() is None

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert a.state == "idle"


def test_state_follows_the_open_sessions(a: pgk.ExecutionContext) -> None:
    assert a.state == "idle"
    with pgk.context_session(a), pgk.context_session(a):
        assert a.state == "active"
    assert a.state == "idle"
    a.destroy()
    assert a.state == "destroyed"


def test_leaving_in_another_thread_raises_and_puts_the_first_right(
    a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    session = pgk.context_session(a)
    with pgk.context_session(b):
        session.__enter__()
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(session.__exit__, None, None, None).exception()
        assert isinstance(error, SessionError)
        assert "'a' was left in a thread that had not entered it" in str(error)
        assert pgk.current_context() is b
    assert a.state == "idle"


def test_leaving_what_nobody_entered(a: pgk.ExecutionContext) -> None:
    with pytest.raises(SessionError, match="no other has"):
        pgk.context_session(a).__exit__(None, None, None)


def test_a_thread_that_dies_inside_a_session_leaves_it(a: pgk.ExecutionContext) -> None:
    session = pgk.context_session(a)
    thread = threading.Thread(target=session.__enter__)
    thread.start()
    thread.join()
    # join() returns when Python is done with the thread, a moment before the system is.
    deadline = time.monotonic() + 10
    while a.state != "idle" and time.monotonic() < deadline:
        time.sleep(0.001)
    a.destroy()


def test_open_sessions_keep_the_context(a: pgk.ExecutionContext) -> None:
    with pgk.context_session(a):
        with pytest.raises(ContextBusyError, match=r"'a' has 1 open session"):
            a.destroy()
        assert pgk.current_context() is a
    a.destroy()


def test_a_destroyed_context_cannot_be_entered(a: pgk.ExecutionContext) -> None:
    session = pgk.context_session(a)
    a.destroy()
    with pytest.raises(ContextDestroyedError, match="'a' has been destroyed"), session:
        pass
    assert pgk.current_context() is None


def test_creating_and_destroying_beside_sessions_in_other_threads() -> None:
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for round_ in range(200):
                context = pgk.create_context(f"{index}-{round_}", 4 * MB)
                with pgk.context_session(context):
                    assert pgk.current_context() is context
                context.destroy()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_session_that_is_dropped_while_entered_is_left(a: pgk.ExecutionContext) -> None:
    session = pgk.context_session(a)
    session.__enter__()
    session.__enter__()
    assert pgk.current_context() is a
    del session
    assert pgk.current_context() is None
    assert a.state == "idle"
    a.destroy()


def test_a_thread_whose_session_another_one_leaves_while_it_leaves_an_outer_one(
    a: pgk.ExecutionContext, b: pgk.ExecutionContext
) -> None:
    """Its stream is the one it had before, then and later."""
    device = get_or_initialize().device
    leaving, left = threading.Event(), threading.Event()
    inner, outer = pgk.context_session(a), pgk.context_session(b)
    seen: list[object] = []

    def work() -> None:
        outer.__enter__()
        inner.__enter__()
        device.hold(b.stream.id)
        pgk.record_event(b)
        leaving.set()
        outer.__exit__(None, None, None)  # waits for the stream
        seen.append((pgk.current_context(), native.current_host_stream()))
        with pgk.context_session(b):
            pass
        seen.append((pgk.current_context(), native.current_host_stream()))
        left.set()

    thread = threading.Thread(target=work)
    thread.start()
    leaving.wait()
    with pytest.raises(SessionError, match="the thread that had is out of it now"):
        inner.__exit__(None, None, None)
    device.let_go(b.stream.id)
    thread.join()
    assert left.is_set()
    assert seen == [(None, 0), (None, 0)]
    assert a.state == b.state == "idle"


def test_daemons_in_sessions_at_the_end_of_the_interpreter() -> None:
    code = """
import asyncio, threading
import pygpukit_torch as pgk
pgk.initialize(device="cpu", total_vram=64 << 20)
context = pgk.create_context("a", 8 << 20)
entered = threading.Barrier(3)

def sleep():
    with pgk.context_session(context):
        entered.wait()
        threading.Event().wait()

async def serve():
    async with pgk.context_session(context):
        await asyncio.to_thread(entered.wait)
        while True:
            await asyncio.sleep(0.001)

threading.Thread(target=sleep, daemon=True).start()
threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
entered.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
