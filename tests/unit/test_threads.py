"""Threads and pool work started in a session are in its context."""

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import MB, ContextBusyError, context_session, create_context

pytestmark = pytest.mark.usefixtures("scheduler")


def name_here() -> str | None:
    context = pgk.current_context()
    return context.name if context else None


def test_a_thread_is_in_the_context_it_was_started_in() -> None:
    a, b = create_context("a", 32 * MB), create_context("b", 32 * MB)
    seen: list[str | None] = []
    kept: list[torch.Tensor] = []

    def work() -> None:
        seen.append(name_here())
        kept.append(torch.ones(MB, dtype=torch.uint8))

    with context_session(a):
        first = threading.Thread(target=work)
        with context_session(b):
            second = threading.Thread(target=work)
            second.start()
            second.join()
        first.start()
        first.join()
    assert seen == ["b", "a"]
    assert a.usage().used == b.usage().used == MB
    third = threading.Thread(target=work)
    third.start()
    third.join()
    assert seen[-1] is None


def test_subclasses_that_override_run() -> None:
    a = create_context("a", 32 * MB)
    seen: list[str | None] = []

    class Worker(threading.Thread):
        def run(self) -> None:
            seen.append(name_here())

    with context_session(a):
        worker = Worker()
        worker.start()
    worker.join()
    assert seen == ["a"]


def test_a_thread_keeps_its_context_active_until_it_ends() -> None:
    a = create_context("a", 32 * MB)
    go = threading.Event()
    with context_session(a):
        worker = threading.Thread(target=go.wait)
        worker.start()
    with pytest.raises(ContextBusyError):
        a.destroy()
    go.set()
    worker.join()
    a.destroy()


def test_a_daemon_does_not_keep_its_context_and_goes_on_outside() -> None:
    """A progress bar's monitor never ends."""
    a = create_context("a", 32 * MB)
    entered, go = threading.Event(), threading.Event()
    results: list[torch.Tensor] = []

    def monitor() -> None:
        entered.set()
        go.wait()
        results.append(torch.ones(MB))

    with context_session(a):
        daemon = threading.Thread(target=monitor, daemon=True)
        daemon.start()
    entered.wait()
    a.destroy()
    go.set()
    daemon.join()
    assert results[0].sum().item() == MB
    assert pgk.stats().contexts == ()


def test_pool_work_is_in_the_context_of_its_submitter_and_workers_are_not() -> None:
    a, b = create_context("a", 32 * MB), create_context("b", 32 * MB)
    with ThreadPoolExecutor(1) as pool:
        with context_session(a):
            assert pool.submit(name_here).result() == "a"
            assert list(pool.map(lambda _: name_here(), range(3))) == ["a"] * 3
        assert pool.submit(name_here).result() is None
        with context_session(b):
            assert pool.submit(name_here).result() == "b"
    assert a.state == b.state == "idle"


def test_work_that_waits_in_a_queue_keeps_its_context() -> None:
    a = create_context("a", 32 * MB)
    go = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(go.wait)
        with context_session(a):
            queued = pool.submit(name_here)
            cancelled = pool.submit(name_here)
        with pytest.raises(ContextBusyError):
            a.destroy()
        assert cancelled.cancel()
        go.set()
        assert queued.result() == "a"
    del cancelled
    a.destroy()


def square(x: int) -> int:
    return x * x


def test_the_threads_of_a_process_pool_are_not_in_it() -> None:
    a = create_context("a", 32 * MB)
    method = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=method) as pool:
        with context_session(a):
            assert pool.submit(square, 3).result() == 9
        a.destroy()


def test_anyios_workers_are_not_in_it() -> None:
    """They serve whoever comes next, too."""
    a = create_context("a", 32 * MB)
    seen: list[str | None] = []

    class WorkerThread(threading.Thread):
        def run(self) -> None:
            seen.append(name_here())

    WorkerThread.__module__ = "anyio._backends._asyncio"
    with context_session(a):
        worker = WorkerThread()
        worker.start()
        worker.join()
    assert seen == [None]


def test_errors_come_through_and_leave_the_session() -> None:
    a = create_context("a", 32 * MB)

    def fail() -> None:
        raise ZeroDivisionError

    with ThreadPoolExecutor(1) as pool, context_session(a):
        with pytest.raises(ZeroDivisionError):
            pool.submit(fail).result()
        assert pool.submit(name_here).result() == "a"
    assert a.state == "idle"


def test_everything_is_put_back_at_shutdown() -> None:
    import subprocess
    import sys

    code = """
import threading, concurrent.futures as futures
start, submit = threading.Thread.start, futures.ThreadPoolExecutor.submit
import pygpukit_torch as pgk
assert threading.Thread.start is start
pgk.initialize(device="cpu")
assert threading.Thread.start is not start
pgk.shutdown()
assert threading.Thread.start is start and futures.ThreadPoolExecutor.submit is submit
"""
    subprocess.run([sys.executable, "-c", code], check=True)
