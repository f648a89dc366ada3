"""Asynchronous sessions on a GPU: streams, waiting, and memory that somebody may still read."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    GB,
    MB,
    SessionError,
    context_session,
    create_context,
    record_event,
    wait_event,
)

pytestmark = pytest.mark.usefixtures("check_invariants")

SLOW = 300_000_000  # cycles: some tenths of a second


def here() -> pgk.ExecutionContext | None:
    context = pgk.current_context()
    expected = context.stream.cuda_stream if context else 0
    assert torch.cuda.current_stream().cuda_stream == expected
    return context


def test_every_step_is_on_its_own_stream_and_charged() -> None:
    contexts = [create_context(f"c{index}", GB) for index in range(4)]
    total = 0

    async def work(context: pgk.ExecutionContext) -> None:
        nonlocal total
        assert here() is None
        async with context_session(context):
            for step in range(50):
                assert here() is context
                used = context.usage().used
                block = torch.full((1024,), float(step), device="cuda")
                assert context.usage().used == used + 4096
                await asyncio.sleep(0 if step % 10 else 0.001)
                total += int(block.sum().item()) == 1024 * step
                del block
        assert here() is None

    async def main() -> None:
        await asyncio.gather(*(work(context) for context in contexts for _ in range(5)))

    asyncio.run(main())
    assert total == 4 * 5 * 50
    assert all(context.state == "idle" for context in contexts)


def test_results_are_right_right_after_an_asynchronous_session() -> None:
    a, b = create_context("a", GB), create_context("b", GB)

    async def produce(context: pgk.ExecutionContext, value: int) -> torch.Tensor:
        async with context_session(context):
            torch.cuda._sleep(5_000_000)
            return torch.full((4 * MB,), value, dtype=torch.int32, device="cuda")

    async def main() -> int:
        right = 0
        for turn in range(50):
            results = await asyncio.gather(produce(a, turn), produce(b, -turn))
            right += [int(r[-1].item()) for r in results] == [turn, -turn]
        return right

    assert asyncio.run(main()) == 50


def test_leaving_awaits_the_work_and_others_go_on() -> None:
    a, b = create_context("a", GB), create_context("b", GB)
    order: list[str] = []

    async def slow() -> None:
        async with context_session(a):
            torch.cuda._sleep(SLOW)
            event = record_event(a)
            order.append("submitted")
        assert event.query()
        order.append("slow is done")

    async def quick() -> None:
        await asyncio.sleep(0)
        for _ in range(5):
            async with context_session(b):
                assert torch.ones(1024, device="cuda").sum().item() == 1024
        order.append("quick is done")

    async def main() -> None:
        await asyncio.gather(slow(), quick())

    asyncio.run(main())
    assert order == ["submitted", "quick is done", "slow is done"]


@pytest.mark.parametrize("what", ["session", "stream", "torch's stream", "event", "host event"])
def test_waiting_for_the_device(what: str) -> None:
    context = create_context("a", GB)
    other = torch.cuda.Stream()

    async def main() -> int:
        session = context_session(context)
        target: Any
        if what == "torch's stream":
            target = other
            with torch.cuda.stream(other):
                torch.cuda._sleep(SLOW)
        else:
            async with context_session(context, wait=False):
                torch.cuda._sleep(SLOW)
            events = {"event": record_event(context)}
            events["host event"] = torch.cuda.Event(blocking=True)
            events["host event"].record(context.stream)
            target = {"session": None, "stream": context.stream, **events}[what]
        done = other.record_event() if target is other else record_event(context)
        assert not done.query()
        waiting = asyncio.create_task(session.synchronize(target))
        turns = 0
        while not waiting.done():
            await asyncio.sleep(0.001)
            turns += 1
        await waiting
        assert done.query()
        await session.synchronize(target)
        return turns

    assert asyncio.run(main()) > 20
    torch.cuda.synchronize()


def test_many_waits_do_not_delay_each_other() -> None:
    contexts = [create_context(f"c{index}", 64 * MB) for index in range(4)]
    finished: list[int] = []

    async def wait(index: int) -> None:
        async with context_session(contexts[index]):
            # The first to be waited for are the last to be done.
            torch.cuda._sleep(40_000_000 * (4 - index))
        finished.append(index)

    async def main() -> None:
        await asyncio.gather(*(wait(index) for index in range(4)))

    asyncio.run(main())
    assert finished == [3, 2, 1, 0]


def test_cancelled_while_it_leaves() -> None:
    """What the task does next waits on the device for what it submitted."""
    context = create_context("a", GB)

    async def one() -> int:
        data: torch.Tensor | None = None
        try:
            async with context_session(context):
                torch.cuda._sleep(SLOW)
                data = torch.full((MB,), 7, device="cuda")
        except asyncio.CancelledError:
            assert here() is None
        assert data is not None
        return int(data.sum().item())

    async def main() -> int:
        task = asyncio.create_task(one())
        await asyncio.sleep(0.02)
        assert not context.stream.query()
        task.cancel()
        return await task

    assert asyncio.run(main()) == 7 * MB


def test_a_stream_that_the_task_chose_is_its_own_again() -> None:
    a, b = create_context("a", GB), create_context("b", GB)
    side = torch.cuda.Stream()

    async def main() -> None:
        async with context_session(a):
            with torch.cuda.stream(side):
                async with context_session(b):
                    assert here() is b
                assert torch.cuda.current_stream() == side
                with context_session(b):
                    assert here() is b
                assert torch.cuda.current_stream() == side
            assert here() is a
            await asyncio.sleep(0)
            assert here() is a

    asyncio.run(main())
    assert here() is None


def test_entering_in_a_capture_is_refused() -> None:
    a, b = create_context("a", GB), create_context("b", GB)

    async def main() -> None:
        async with context_session(a):
            x = torch.ones(MB, device="cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = x + 1
                with pytest.raises(SessionError, match="in the middle of a graph capture"):
                    await context_session(b).__aenter__()
            graph.replay()
        assert y.sum().item() == 2 * MB
        assert here() is None

    asyncio.run(main())
    assert a.state == b.state == "idle"


@pytest.mark.parametrize("freed", ["by the consumer", "by the producer", "outside"])
def test_a_slow_consumer_reads_what_it_was_given(freed: str) -> None:
    """The producer goes on allocating and writing, whoever drops the tensor last."""
    producer, consumer = create_context("producer", GB), create_context("consumer", GB)
    # The first launch of a kernel waits for the device, so that nobody would be slow.
    torch.full((MB,), 7, dtype=torch.uint8, device="cuda").to(torch.int32).sum()

    async def main() -> int:
        async with context_session(producer):
            data = torch.full((64 * MB,), 7, dtype=torch.uint8, device="cuda")
            event = record_event(producer)
        async with context_session(consumer, wait=False):
            wait_event(consumer, event)
            torch.cuda._sleep(SLOW)
            total = data.to(torch.int32).sum()
            if freed == "by the producer":
                data.record_stream(consumer.stream)
            elif freed == "by the consumer":
                del data
        assert not consumer.stream.query()
        if freed == "outside":
            consumed = record_event(consumer)
            torch.cuda.current_stream().wait_event(consumed)
            del data
        async with context_session(producer, wait=False):
            if freed == "by the producer":
                del data
            for _ in range(4):
                torch.full((64 * MB,), 9, dtype=torch.uint8, device="cuda")
            assert not consumer.stream.query()
        await context_session(consumer).synchronize()
        return int(total.item())

    assert asyncio.run(main()) == 7 * 64 * MB


def test_backward_in_other_tasks_and_threads() -> None:
    """Gradients are charged to the context of their forward, wherever backward is called."""
    a, b = create_context("a", GB), create_context("b", GB)

    async def main() -> None:
        async with context_session(a) as session:
            weight = torch.ones(4 * MB, device="cuda", requires_grad=True)
            loss = torch.utils.checkpoint.checkpoint(
                lambda: (weight * 2).sin().sum(), use_reentrant=False
            )
            hooked: list[pgk.ExecutionContext | None] = []
            weight.register_hook(lambda grad: hooked.append(pgk.current_context()) or grad * 2)
            await session.synchronize()
        used = a.usage().used
        async with context_session(b):
            before = b.usage().used
            await asyncio.to_thread(loss.backward)
            assert b.usage().used == before
        assert weight.grad is not None
        assert a.usage().used == used + weight.grad.nbytes
        del loss

    asyncio.run(main())


def test_threads_of_a_task() -> None:
    a = create_context("a", GB)
    seen: list[pgk.ExecutionContext | None] = []

    async def main() -> None:
        async with context_session(a) as session:
            assert await session.to_thread(here) is a
            assert await asyncio.to_thread(here) is a
            thread = threading.Thread(target=lambda: seen.append(here()))
            thread.start()
            await asyncio.to_thread(thread.join)

    asyncio.run(main())
    assert seen == [a]
    assert a.state == "idle"
