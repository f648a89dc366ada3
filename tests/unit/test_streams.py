"""Streams and events of contexts, with streams that a test holds."""

import threading

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import MB, ContextDestroyedError
from pygpukit_torch import runtime as pgk_runtime

pytestmark = pytest.mark.usefixtures("scheduler")


@pytest.fixture
def producer() -> pgk.ExecutionContext:
    return pgk.create_context("producer", 4 * MB)


@pytest.fixture
def consumer() -> pgk.ExecutionContext:
    return pgk.create_context("consumer", 4 * MB)


def test_every_context_has_a_stream_of_its_own(
    producer: pgk.ExecutionContext, consumer: pgk.ExecutionContext
) -> None:
    assert pgk.get_stream(producer) is producer.stream
    assert producer.stream.id != consumer.stream.id
    assert producer.stream.priority == 0
    producer.stream.synchronize()
    assert producer.stream.query()
    with torch.cpu.stream(producer.stream):
        assert torch.cpu.current_stream() is producer.stream


def test_an_event_waits_for_what_was_before_it(
    producer: pgk.ExecutionContext, consumer: pgk.ExecutionContext
) -> None:
    device = pgk_runtime.get_or_initialize().device
    device.hold(producer.stream.id)
    event = pgk.record_event(producer)
    assert not event.query()
    assert not producer.stream.query()
    assert consumer.stream.query()
    arrived = threading.Event()

    def consume() -> None:
        with pgk.context_session(consumer):
            pgk.wait_event(consumer, event)
            arrived.set()

    thread = threading.Thread(target=consume)
    thread.start()
    assert not arrived.wait(0.05)
    assert not consumer.stream.query()
    device.let_go(producer.stream.id)
    thread.join(10)
    assert arrived.is_set()
    assert event.query()
    event.synchronize()


def test_streams_order_each_other(
    producer: pgk.ExecutionContext, consumer: pgk.ExecutionContext
) -> None:
    device = pgk_runtime.get_or_initialize().device
    consumer.stream.wait_stream(producer.stream)
    event = producer.stream.record_event()
    device.hold(producer.stream.id)
    event.record(producer.stream)
    assert not event.query()
    threading.Timer(0.02, device.let_go, [producer.stream.id]).start()
    event.wait(consumer.stream)
    assert event.query()


def test_streams_of_a_destroyed_context_say_so(producer: pgk.ExecutionContext) -> None:
    stream, event = producer.stream, pgk.record_event(producer)
    producer.destroy()
    for call in (stream.synchronize, stream.query, stream.record_event):
        with pytest.raises(ContextDestroyedError, match="'producer' has been destroyed"):
            call()
    assert event.query()


def test_streams_and_events_of_others_are_refused(producer: pgk.ExecutionContext) -> None:
    with pytest.raises(TypeError, match="expected the stream of a context, got Stream"):
        producer.stream.wait_stream(torch.cpu.Stream())
    with pytest.raises(TypeError, match="expected an event from record_event, got Event"):
        producer.stream.wait_event(torch.cpu.Event())  # type: ignore[arg-type]
