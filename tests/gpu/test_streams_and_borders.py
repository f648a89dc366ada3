"""Sessions switch the stream, hand over at their borders, and are found again by it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    GB,
    MB,
    QoSPolicy,
    SessionError,
    context_session,
    create_context,
    get_stream,
    record_event,
    wait_event,
)
from tests.gpu.beside import at_once

pytestmark = pytest.mark.usefixtures("check_invariants")


def current() -> int:
    return torch.cuda.current_stream().cuda_stream


def test_streams_have_their_tiers_priority() -> None:
    tiers = (QoSPolicy.GUARANTEED, QoSPolicy.BURSTABLE, QoSPolicy.BEST_EFFORT)
    streams = [get_stream(create_context(tier.value, 64 * MB, qos=tier)) for tier in tiers]
    assert isinstance(streams[0], torch.cuda.ExternalStream)
    assert len({stream.id for stream in streams}) == 3
    guaranteed, burstable, best_effort = (stream.priority for stream in streams)
    assert guaranteed < burstable < best_effort == 0
    assert guaranteed == -5


def test_sessions_nest_and_put_back_what_was_there() -> None:
    a, b = create_context("a", GB), create_context("b", GB)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        with context_session(a):
            assert current() == a.stream.id
            with context_session(b):
                assert current() == b.stream.id
                with context_session(a):
                    assert current() == a.stream.id
                assert current() == b.stream.id
            assert current() == a.stream.id
        assert current() == side.cuda_stream
    assert current() == 0


def test_sessions_that_end_out_of_order_leave_the_right_stream() -> None:
    a, b = create_context("a", GB), create_context("b", GB)
    first, second = context_session(a), context_session(b)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert current() == b.stream.id
    second.__exit__(None, None, None)
    assert current() == 0


def test_a_thread_whose_session_another_one_left_gets_its_stream_back() -> None:
    context = create_context("a", GB)
    session = context_session(context)
    session.__enter__()

    def leave() -> None:
        with pytest.raises(SessionError, match="the thread that had is out of it now"):
            session.__exit__(None, None, None)

    # Threads that are started in a session are in it; this one is to be outside.
    from pygpukit_torch import threads

    thread = threading.Thread(target=leave)
    threads._start(thread)
    thread.join()
    x = torch.ones(1000, device="cuda")
    assert current() == 0
    assert not context._native.block_bytes(x.data_ptr())


def test_results_are_right_right_after_a_session_a_thousand_times() -> None:
    context = create_context("a", GB)
    big = torch.randn(2048, 2048, device="cuda")
    for attempt in range(1000):
        source = torch.full((1 << 16,), float(attempt), device="cuda")  # made outside, unfinished
        with context_session(context):
            y = big @ big
            result = source + 1
            del y
        assert result.sum().item() == (attempt + 1) * (1 << 16)


def test_a_hand_over_between_contexts_needs_nothing() -> None:
    producer, consumer = create_context("p", GB), create_context("c", GB)
    for attempt in range(100):
        with context_session(producer):
            torch.cuda._sleep(1_000_000)
            data = torch.full((1 << 20,), attempt, dtype=torch.int32, device="cuda")
        with context_session(consumer):
            assert data.sum().item() == attempt << 20


def test_without_waiting_events_order_the_work() -> None:
    producer, consumer = create_context("p", GB), create_context("c", GB)
    with context_session(producer, wait=False):
        torch.cuda._sleep(200_000_000)
        data = torch.full((1 << 20,), 3, dtype=torch.int32, device="cuda")
        event = record_event(producer)
    assert not event.query()
    with context_session(consumer, wait=False):
        wait_event(consumer, event)
        total = data.sum()
    assert not event.query()
    consumer.stream.synchronize()
    assert total.item() == 3 << 20
    with pytest.raises(TypeError, match="expected an event"):
        wait_event(consumer, "event")  # type: ignore[arg-type]


def test_a_session_cannot_begin_in_a_capture() -> None:
    context = create_context("a", GB)
    graph = torch.cuda.CUDAGraph()
    x = torch.ones(10, device="cuda")
    with torch.cuda.graph(graph):
        y = x + 1
        with pytest.raises(SessionError, match="in the middle of a graph capture"):
            context_session(context).__enter__()
    graph.replay()
    assert y.sum().item() == 20
    assert context.state == "idle"


def test_threads_started_in_a_session_are_in_it() -> None:
    context = create_context("a", GB)
    seen: list[tuple[int, bool]] = []

    def work() -> None:
        x = torch.ones(1000, device="cuda")
        seen.append((current(), context._native.block_bytes(x.data_ptr()) > 0))

    with context_session(context), ThreadPoolExecutor(1) as pool:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        pool.submit(work).result()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(context.stream.id, True)] * 2 + [(0, False)]


def test_a_thread_without_a_session_on_a_contexts_stream_is_in_the_context() -> None:
    context = create_context("a", GB)
    with context_session(context):
        pass
    with torch.cuda.stream(context.stream):
        x = torch.ones(1000, device="cuda")
    assert context._native.block_bytes(x.data_ptr()) == 4096
    context.stream.synchronize()


def test_enter_fails_when_the_device_does_and_leaves_the_thread_outside() -> None:
    context = create_context("a", GB)
    runtime = context._runtime
    torch.cuda._sleep(100_000_000)
    runtime.device.inject_fault(1, pgk.native.Device.Call.record)
    with pytest.raises(pgk.DeviceError, match="record failed: injected fault"):
        context_session(context).__enter__()
    assert current() == 0
    assert context.state == "idle"
    torch.cuda.synchronize()


def test_exit_tells_of_a_failed_wait_and_leaves_all_the_same() -> None:
    context = create_context("a", GB)
    runtime = context._runtime
    session = context_session(context)
    session.__enter__()
    torch.cuda._sleep(100_000_000)
    runtime.device.inject_fault(1, pgk.native.Device.Call.synchronize)
    with pytest.raises(pgk.DeviceError, match="synchronize failed: injected fault"):
        session.__exit__(None, None, None)
    assert current() == 0
    assert context.state == "idle"
    torch.cuda.synchronize()


def test_sessions_on_two_threads_overlap() -> None:
    a, b = create_context("a", GB), create_context("b", GB)
    started = threading.Barrier(2)
    spans: list[float] = []

    def work(context: pgk.ExecutionContext) -> None:
        started.wait()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with context_session(context):
            begin.record()
            torch.cuda._sleep(400_000_000)
            end.record()
        spans.append(begin.elapsed_time(end))

    whole_begin, whole_end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    whole_begin.record()
    at_once(partial(work, a), partial(work, b))
    whole_end.record()
    torch.cuda.synchronize()
    assert whole_begin.elapsed_time(whole_end) < 0.75 * sum(spans)
