"""More models than the device holds, with torch, on the host device: in turns, from threads, from
tasks, with handlers; and what the public functions say of it."""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import MB, ContextBusyError, ContextDestroyedError, QoSPolicy, context_session
from pygpukit_torch.runtime import existing


def model(seed: int, megabytes: int) -> torch.nn.Module:
    """Weights of about that size, in layers of 4 MiB."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(megabytes // 4)]
    return torch.nn.Sequential(*layers).requires_grad_(False)


def runtime() -> pgk.runtime.Runtime:
    found = existing()
    assert found is not None
    return found


def loaded(
    name: str, megabytes: int, seed: int, **options: object
) -> tuple[pgk.ExecutionContext, torch.nn.Module]:
    context = pgk.create_context(name, (megabytes + 8) * MB, **options)  # type: ignore[arg-type]
    with context_session(context):
        return context, model(seed, megabytes)


@pytest.fixture
def small() -> Iterator[None]:
    """A device of 48 MiB with host memory for 256 MiB."""
    pgk.initialize(device="cpu", total_vram=48 * MB, host_backup=256 * MB, claim_timeout=1)
    yield
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()


@pytest.mark.parametrize("tier", [QoSPolicy.BURSTABLE, QoSPolicy.BEST_EFFORT])
def test_six_models_of_a_third_of_the_device_in_200_turns(small: None, tier: QoSPolicy) -> None:
    models = [loaded(f"m{seed}", 16, seed, qos=tier) for seed in range(6)]
    x = torch.randn(4, 1024)
    choice = random.Random(7)

    def answer(turn: int) -> torch.Tensor:
        context, net = models[turn]
        with context_session(context):
            assert context.usage().evicted == 0
            return torch.softmax(net(x), -1).clone()

    expected = [answer(turn) for turn in range(6)]
    for _ in range(200):
        turn = choice.randrange(6)
        assert torch.equal(answer(turn), expected[turn])
        assert pgk.stats().reserved <= 48 * MB
    runtime().manager.check_invariants()
    contexts = pgk.stats().contexts
    assert sum(context.restores for context in contexts) > 50
    assert all(context.pages_unchanged for context in contexts), "weights never change"


def test_training_goes_on_after_an_eviction(small: None) -> None:
    def losses(evict: bool) -> list[float]:
        context = pgk.create_context(f"train-{evict}", 46 * MB)
        with context_session(context):
            net = model(3, 8).requires_grad_(True)
            optimizer = torch.optim.Adam(net.parameters())
            x = torch.randn(8, 1024)
        seen = []
        for _ in range(4):
            with context_session(context):
                loss = net(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.append(loss.item())
            del loss
            if evict:
                context.evict()
                assert context.usage().reserved == 0
        del net, optimizer, x
        context.destroy()
        return seen

    assert losses(True) == losses(False)


def test_tensors_of_an_evicted_context_can_be_read_and_written_outside(small: None) -> None:
    context, net = loaded("a", 16, 0)
    before = net[0].weight.clone()
    context.evict()
    assert context.usage().evicted >= 16 * MB
    assert torch.equal(net[0].weight, before)
    net[0].weight[0, 0] = 5.0
    context.restore()
    assert context.usage().evicted == 0
    assert net[0].weight[0, 0] == 5.0
    assert "evicted" not in repr(context)


def test_pressure_handlers(small: None, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    @pgk.on_memory_pressure
    def handler(context: pgk.ExecutionContext, requested: int, available: int) -> bool:
        asked.append((context.name, requested, available))
        return False

    a, net = loaded("a", 32, 0)
    b = pgk.create_context("b", 40 * MB)
    with (
        context_session(b),
        pytest.raises(torch.OutOfMemoryError, match="memory pressure handler refused"),
    ):
        torch.empty(32 * MB, dtype=torch.uint8)
    assert [(name, requested) for name, requested, _ in asked] == [("b", 32 * MB)]
    assert asked[0][2] >= 32 * MB
    assert handler(b, 1, 2) is False
    handler.remove()
    handler.remove()

    @pgk.on_memory_pressure
    def broken(context: pgk.ExecutionContext, requested: int, available: int) -> bool:
        raise RuntimeError("out of order")

    with (
        caplog.at_level(logging.ERROR, "pygpukit_torch"),
        context_session(b),
        pytest.raises(torch.OutOfMemoryError),
    ):
        torch.empty(32 * MB, dtype=torch.uint8)
    assert "out of order" in caplog.text
    broken.remove()
    pgk.on_memory_pressure(lambda *_: True)
    with context_session(b):
        x = torch.ones(32 * MB, dtype=torch.uint8)
    assert a.usage().evicted > 0
    assert net[0].weight.isfinite().all()
    assert x.sum() == 32 * MB
    with pytest.raises(TypeError, match="a handler must be callable, got int 3"):
        pgk.on_memory_pressure(3)  # type: ignore[arg-type]


def test_shutdown_forgets_handlers(small: None) -> None:
    pgk.on_memory_pressure(lambda *_: False)
    pgk.shutdown()
    pgk.initialize(device="cpu", total_vram=48 * MB, host_backup=256 * MB)
    _, first = loaded("a", 32, 0)
    _, second = loaded("b", 32, 1)
    assert first[0].weight.isfinite().all()
    assert second[0].weight.isfinite().all()


def test_by_hand(small: None) -> None:
    context, net = loaded("a", 16, 0)
    with context_session(context), pytest.raises(ContextBusyError, match="it is in use"):
        context.evict()
    context.evict()
    context.evict()
    with context.pin() as pin:
        assert context.usage().evicted == 0
        with pytest.raises(ContextBusyError, match="it is pinned"):
            context.evict()
    pin.release()
    context.evict()
    context.prefetch()
    deadline = time.monotonic() + 10
    while context.usage().evicted and time.monotonic() < deadline:
        time.sleep(0.001)
    assert context.usage().evicted == 0
    stats = context.memory_stats()
    assert (stats["num_evictions"], stats["num_restores"]) == (2, 2)
    assert stats["evicted_bytes.copied_in"] >= 32 * MB
    del net
    context.destroy()
    for call in (context.evict, context.restore, context.prefetch, context.pin):
        with pytest.raises(ContextDestroyedError):
            call()


def test_a_forgotten_pin_is_released(small: None) -> None:
    context, _ = loaded("a", 16, 0)
    context.pin()
    context.evict()


def test_entering_from_a_task_does_not_block_the_loop(small: None) -> None:
    a, first = loaded("a", 32, 0)
    b, second = loaded("b", 32, 1)
    x = torch.randn(2, 1024)
    with context_session(a):
        expected = {a: first(x).clone()}
    with context_session(b):
        expected[b] = second(x).clone()
    longest = 0.0

    async def ticks(stop: asyncio.Event) -> None:
        nonlocal longest
        last = time.perf_counter()
        while not stop.is_set():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    async def main() -> None:
        stop = asyncio.Event()
        ticking = asyncio.create_task(ticks(stop))
        for _ in range(5):
            for context, net in ((a, first), (b, second)):
                async with context_session(context):
                    assert pgk.current_context() is context
                    assert context.usage().evicted == 0
                    assert torch.equal(net(x), expected[context])
        stop.set()
        await ticking

    asyncio.run(main())
    assert longest > 0


def test_a_task_that_cannot_enter_is_told(small: None) -> None:
    a, _net = loaded("a", 32, 0)
    b, _other = loaded("b", 32, 1)

    async def enter() -> None:
        async with context_session(a):
            pass

    async def main() -> None:
        async with context_session(b):
            with pytest.raises(torch.OutOfMemoryError, match=r"'a' \(burstable\) cannot come back"):
                await asyncio.create_task(enter())
        await enter()
        await b.evict_async()
        assert b.usage().reserved == 0
        await b.restore_async()
        assert b.usage().evicted == 0
        with pytest.raises(ContextBusyError):
            async with context_session(b):
                await b.evict_async()
        task = asyncio.create_task(a.restore_async())
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(main())
    assert a.state == b.state == "idle"


def test_a_consumer_keeps_its_producer_where_it_is(small: None) -> None:
    a, net = loaded("a", 32, 0)
    b = pgk.create_context("b", 40 * MB)
    c = pgk.create_context("c", 40 * MB)
    with context_session(a):
        event = pgk.record_event(a)
    assert event.producer is a
    with context_session(b):
        pgk.wait_event(b, event)
        with context_session(c), pytest.raises(torch.OutOfMemoryError):
            torch.empty(32 * MB, dtype=torch.uint8)
        assert net[0].weight.isfinite().all()
    with context_session(c):
        torch.empty(32 * MB, dtype=torch.uint8)
    assert a.usage().evicted > 0


def test_a_reservation_is_lent_and_claimed_while_others_work(small: None) -> None:
    """The borrower's thread goes on in between; its results stay right."""
    reserved = pgk.create_context("reserved", 32 * MB, qos=QoSPolicy.GUARANTEED)
    low, net = loaded("low", 36, 2, qos=QoSPolicy.BEST_EFFORT)
    x = torch.randn(2, 1024)
    with context_session(low):
        expected = net(x).clone()
    wrong = []
    stop = threading.Event()

    def borrow() -> None:
        while not stop.is_set():
            try:
                with context_session(low):
                    wrong.append(not torch.equal(net(x), expected))
            except torch.OutOfMemoryError:
                time.sleep(0.001)

    thread = threading.Thread(target=borrow, daemon=True)
    thread.start()
    for turn in range(20):
        with context_session(reserved):
            y = torch.full((28 * MB,), turn, dtype=torch.uint8)
        assert y.eq(turn).all()
        del y
        reserved.evict()
        time.sleep(0.002)
    stop.set()
    thread.join()
    assert wrong
    assert not any(wrong)
    runtime().manager.check_invariants()
