"""A page moves only when no work can touch it: whoever moves it waits for every stream that is
known, and gives up in time. On a host device, whose held streams stand for kernels that still run.
"""

import ctypes
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pygpukit_torch import ContextBusyError, DeviceError, native
from pygpukit_torch.native import Move
from tests.turns import background, wait_until

MB = 1 << 20
PAGE = 2 * MB
MOMENT = 0.1  # long enough for what does not wait to be over


class Bench:
    """A device of 16 MiB, with blocks whose bytes are told by a mark."""

    def __init__(
        self, capacity: int = 16 * MB, backup: int = 64 * MB, claim_timeout: float = 30
    ) -> None:
        self.device = native.HostDevice(capacity)
        self.manager = native.Manager(self.device, host_backup=backup, claim_timeout=claim_timeout)
        self.blocks: dict[int, tuple[int, int]] = {}  # sizes and marks

    def create(self, name: str, budget: int = 12 * MB, base: int = 0) -> native.Context:
        return self.manager.create_context(name, budget, base)

    def fill(self, context: native.Context, size: int, mark: int) -> int:
        address = context.allocate(size)
        ctypes.memset(address, mark, size)
        self.blocks[address] = (size, mark)
        return address

    def read_on(self, stream: int, source: int, target: int) -> None:
        """Queue work that reads the larger block at ``source`` and fills all of the other."""
        self.device.hold(stream)
        size, mark = self.blocks[target][0], self.blocks[source][1]
        assert size < self.blocks[source][0]
        self.device.copy(target, source, size, stream)
        self.blocks[target] = (size, mark)

    def check(self) -> None:
        self.manager.check_invariants()
        assert self.device.refused_moves == 0
        for address, (size, mark) in self.blocks.items():
            memory = (ctypes.c_uint8 * size).from_address(address)
            assert torch.frombuffer(memory, dtype=torch.uint8).eq(mark).all()

    def evicted(self, name: str) -> int:
        """Also of a context that has been destroyed."""
        usages = self.manager.device_usage().contexts
        return next(usage.evicted for usage in usages if usage.name == name)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def hasty() -> Bench:
    """A bench whose manager soon gives up."""
    return Bench(claim_timeout=0.05)


def enter(context: native.Context) -> None:
    """And leave."""
    session = native.Session(context, ordered=False)
    session.enter()
    session.exit()


class Waiting:
    """A call in a thread of its own, which must not return before the streams are let go."""

    def __init__(self, bench: Bench, call: Callable[..., Any], *args: Any) -> None:
        self.bench = bench
        self.future = background(call, *args)
        self.still()

    def still(self) -> None:
        time.sleep(MOMENT)
        assert not self.future.done(), self.future.exception() or "it did not wait"

    def ends(self, *streams: int) -> Any:
        for stream in streams:
            self.bench.device.let_go(stream)
        return self.future.result(30)


# Whose work is waited for -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["idle", "destroyed", "record_use"])
def test_the_claimants_own_stream(bench: Bench, how: str) -> None:
    a, b = bench.create("a"), bench.create("b")
    block, target = bench.fill(a, 10 * MB, 1), bench.fill(b, MB, 2)
    if how == "record_use":
        a.record_use(block, b.stream)
    if how == "destroyed":
        bench.manager.destroy_context(a)
    bench.read_on(b.stream, block, target)
    claim = Waiting(bench, b.allocate, 10 * MB)
    assert bench.evicted("a") == 0
    assert claim.ends(b.stream)
    assert bench.evicted("a") == 6 * MB
    bench.check()


def test_the_stream_of_the_context_that_moves(bench: Bench) -> None:
    a = bench.create("a")
    block, other = bench.fill(a, 10 * MB, 1), bench.fill(a, MB, 2)
    bench.read_on(a.stream, block, other)
    Waiting(bench, bench.manager.evict_context, a).ends(a.stream)
    bench.check()


@pytest.mark.parametrize("by", ["hand", "need"])
def test_the_stream_of_a_third_context(bench: Bench, by: str) -> None:
    a, b, c = bench.create("a"), bench.create("b"), bench.create("c")
    block, target = bench.fill(a, 10 * MB, 1), bench.fill(c, MB, 2)
    bench.read_on(c.stream, block, target)
    if by == "hand":
        waiting = Waiting(bench, bench.manager.evict_context, a)
    else:
        waiting = Waiting(bench, b.allocate, 10 * MB)
    assert bench.evicted("a") == 0
    waiting.ends(c.stream)
    assert bench.evicted("a") > 0
    bench.check()


def test_the_stream_of_a_context_that_is_gone(bench: Bench) -> None:
    """Nothing is left of it but what its stream holds."""
    a, c = bench.create("a"), bench.create("c")
    block, target = bench.fill(a, 10 * MB, 1), bench.fill(a, MB, 2)
    stream = c.stream
    bench.read_on(stream, block, target)
    bench.manager.destroy_context(c)
    Waiting(bench, bench.manager.evict_context, a).ends(stream)
    bench.check()


def test_a_stream_that_memory_was_handed_out_for(bench: Bench) -> None:
    a, c = bench.create("a"), bench.create("c")
    side = bench.device.create_stream()
    block, target = bench.fill(a, 10 * MB, 1), c.allocate(MB, side)
    bench.blocks[target] = (MB, 0)
    bench.read_on(side, block, target)
    Waiting(bench, bench.manager.evict_context, a).ends(side)
    bench.check()


def test_a_stream_that_is_named_while_the_eviction_waits(bench: Bench) -> None:
    a, c = bench.create("a"), bench.create("c")
    block = bench.fill(a, 10 * MB, 1)
    first, second = bench.fill(c, MB, 2), bench.fill(c, MB, 3)
    bench.read_on(c.stream, block, first)
    eviction = Waiting(bench, bench.manager.evict_context, a)
    side = bench.device.create_stream()
    a.record_use(block, side)
    bench.read_on(side, block, second)
    bench.device.let_go(c.stream)
    eviction.still()
    assert bench.evicted("a") == 0
    eviction.ends(side)
    assert bench.evicted("a") == 10 * MB
    bench.check()


def test_a_stream_that_a_free_names(bench: Bench) -> None:
    """The block that it uses is gone, but shares its page with one that lives."""
    a = bench.create("a")
    lives, block = bench.fill(a, MB // 2, 1), bench.fill(a, MB // 2, 2)
    side = bench.device.create_stream()
    bench.device.hold(side)
    bench.device.copy(block, lives, MB // 2, side)
    del bench.blocks[block]
    a.free_after(block, [side])
    Waiting(bench, bench.manager.evict_context, a).ends(side)
    assert bench.evicted("a") == PAGE
    bench.check()


def test_pages_come_back_under_no_work_either(bench: Bench) -> None:
    a, c = bench.create("a"), bench.create("c")
    block, target = bench.fill(a, 10 * MB, 1), bench.fill(c, MB, 2)
    bench.manager.evict_context(a)
    bench.read_on(c.stream, block, target)
    Waiting(bench, enter, a).ends(c.stream)
    assert bench.evicted("a") == 0
    bench.check()


def test_streams_that_no_longer_exist_hold_nothing_up(bench: Bench) -> None:
    a = bench.create("a")
    block = bench.fill(a, 10 * MB, 1)
    side = bench.device.create_stream()
    a.record_use(block, side)
    bench.device.destroy_stream(side)
    bench.manager.evict_context(a)
    bench.check()


def test_work_within_the_session_of_a_daemon(bench: Bench) -> None:
    a = bench.create("a")
    block, other = bench.fill(a, 10 * MB, 1), bench.fill(a, MB, 2)
    daemon = native.Session(a, ordered=False, keeps_active=False)
    daemon.enter()
    bench.read_on(a.stream, block, other)
    Waiting(bench, bench.manager.evict_context, a).ends(a.stream)
    daemon.exit()
    bench.check()


# Giving up --------------------------------------------------------------------------------------


def test_evicting_gives_up_in_time(hasty: Bench) -> None:
    a, c = hasty.create("a"), hasty.create("reader")
    block, target = hasty.fill(a, 10 * MB, 1), hasty.fill(c, MB, 2)
    hasty.read_on(c.stream, block, target)
    with pytest.raises(ContextBusyError, match="reader"):
        hasty.manager.evict_context(a)
    hasty.manager.check_invariants()
    assert hasty.evicted("a") == 0
    enter(a)
    hasty.device.let_go(c.stream)
    hasty.check()
    hasty.manager.evict_context(a)
    assert hasty.evicted("a") == 10 * MB
    hasty.check()


@pytest.mark.parametrize("how", ["enter", "restore", "allocate"])
def test_what_needs_the_pages_gives_up_in_time(hasty: Bench, how: str) -> None:
    """A is out to more than the half; the reader holds what should make room for it, or for B."""
    a, b, c = hasty.create("a"), hasty.create("b", 16 * MB), hasty.create("reader")
    block, target = hasty.fill(a, 10 * MB, 1), hasty.fill(c, MB, 2)
    hasty.manager.evict_context(a)
    other = hasty.fill(b, 14 * MB, 3)
    hasty.read_on(c.stream, other, target)
    calls: dict[str, Callable[[], object]] = {
        "enter": lambda: enter(a),
        "restore": lambda: hasty.manager.restore_context(a),
        "allocate": lambda: hasty.fill(a, 2 * MB, 4),
    }
    held = [hasty.manager.usage(context).resident for context in (a, b, c)]
    refusal = torch.OutOfMemoryError if how == "allocate" else ContextBusyError
    with pytest.raises(refusal, match="reader"):
        calls[how]()
    hasty.manager.check_invariants()
    assert [hasty.manager.usage(context).resident for context in (a, b, c)] == held
    assert hasty.evicted("a") == 10 * MB
    assert ctypes.string_at(block, 8) == b"\1" * 8
    hasty.device.let_go(c.stream)
    hasty.check()
    calls[how]()
    hasty.check()


# What the host device checks --------------------------------------------------------------------


@pytest.mark.parametrize("reads", [True, False])
def test_the_device_refuses_to_move_what_queued_work_touches(reads: bool) -> None:
    device = native.HostDevice(64 * MB)
    start = device.reserve(4 * PAGE, PAGE)
    pages = [start + i * PAGE for i in range(4)]
    handles = [device.create(PAGE) for _ in pages]
    for mark, (page, handle) in enumerate(zip(pages, handles, strict=True), start=1):
        device.map(page, handle)
        ctypes.memset(page, mark, PAGE)
    stream = device.create_stream()
    outside = ctypes.create_string_buffer(b"\7" * 16, 16)
    # From the end of the second page to the beginning of the third.
    touched, beside = pages[2] - 8, ctypes.addressof(outside)
    device.hold(stream)
    device.copy(*((beside, touched) if reads else (touched, beside)), 16, stream)

    def move(number: int) -> None:
        device.move([Move(pages[number], handles[number], device.create_host(PAGE))])

    for count, number in enumerate((1, 2), start=1):
        with pytest.raises((DeviceError, ContextBusyError)):
            move(number)
        assert device.refused_moves == count
    move(0)
    move(3)
    device.let_go(stream)
    move(1)
    move(2)
    assert device.refused_moves == 2
    expected = bytearray(b"".join(bytes([mark]) * PAGE for mark in (1, 2, 3, 4)))
    if reads:
        assert outside.raw == b"\2" * 8 + b"\3" * 8
    else:
        expected[touched - start : touched - start + 16] = b"\7" * 16
    assert ctypes.string_at(start, 4 * PAGE) == bytes(expected)


# Swapping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("live", "backup"), [(24, 26), (32, 34)])
def test_two_contexts_swap_through_little_host_memory(live: int, backup: int) -> None:
    """What comes in frees what goes out next."""
    bench = Bench(32 * MB, backup * MB)
    a, b = bench.create("a", 32 * MB), bench.create("b", 32 * MB)
    bench.fill(a, live * MB, 1)
    bench.fill(b, live * MB, 2)
    for _ in range(2):
        for context, other in ((a, b), (b, a)):
            enter(context)
            assert bench.evicted(context.name) == 0
            assert bench.evicted(other.name) == (2 * live - 32) * MB
            assert bench.manager.device_usage().host_taken <= backup * MB
            bench.check()


# Consumers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_consumers_wait_while_their_producer_moves(when: str) -> None:
    """Those that enter, and those that join since they become consumers only now."""
    bench = Bench(64 * MB)
    a, b = bench.create("a", 64 * MB), bench.create("b")
    bench.fill(a, 64 * MB, 1)
    seen = 0
    for _ in range(5):
        if when == "before":
            bench.manager.declare_consumer(a, b)
        eviction = background(bench.manager.evict_context, a)
        wait_until(lambda: a.is_moving or bench.evicted("a") > 0)
        seen += a.is_moving
        session = native.Session(b, ordered=False)
        session.enter()
        if when == "meanwhile":
            bench.manager.declare_consumer(a, b)
            bench.manager.join(a)
        assert not a.is_moving
        assert bench.evicted("a") == 64 * MB
        session.exit()
        eviction.result(30)
        bench.manager.restore_context(a)
    assert seen
    bench.check()


# Coming back -------------------------------------------------------------------------------------


def test_who_joins_a_context_on_its_way_back_may_be_whom_it_waits_for() -> None:
    """A stream waits for a thread, and that for the context: as a host function would have it."""
    bench = Bench(claim_timeout=30)
    a, b = bench.create("a"), bench.create("b", 2 * MB)
    bench.fill(a, 8 * MB, 1)
    bench.fill(b, MB, 2)
    bench.manager.evict_context(a)
    bench.device.hold(b.stream)
    bench.device.record(b.stream)
    back = background(lambda: bench.manager.restore_context(a))
    wait_until(lambda: not a.is_ready)
    time.sleep(MOMENT)  # it waits for b's stream by now
    start = time.monotonic()
    bench.manager.join(a)
    waited = time.monotonic() - start
    bench.device.let_go(b.stream)
    back.result(20)
    assert waited < 10, "not for all of claim_timeout"
    assert bench.evicted("a") == 0
    bench.check()


def test_threads_that_pin_what_is_left_of_a_context_do_not_wait_for_each_other() -> None:
    bench = Bench(claim_timeout=30)
    a, b = bench.create("a"), bench.create("b", 2 * MB)
    bench.fill(a, 8 * MB, 1)
    bench.manager.evict_context(a)
    bench.manager.destroy_context(a)
    bench.device.hold(b.stream)
    bench.device.record(b.stream)
    pins = [background(lambda: bench.manager.pin(a)) for _ in range(3)]
    time.sleep(MOMENT)
    bench.device.let_go(b.stream)
    for pin in pins:
        pin.result(20)
    assert bench.evicted("a") == 0
    bench.check()


def test_coming_back_slowly_ends_with_whom_it_waited_for() -> None:
    bench = Bench(claim_timeout=0.3)
    a, b = bench.create("a"), bench.create("b", 2 * MB)
    bench.fill(a, 8 * MB, 1)
    bench.manager.evict_context(a)
    bench.device.hold(b.stream)
    bench.device.record(b.stream)
    with pytest.raises(
        ContextBusyError, match=r"'a' cannot be brought back.*stream of context 'b'"
    ):
        bench.manager.restore_context(a)
    bench.device.let_go(b.stream)
    bench.manager.restore_context(a)
    assert bench.evicted("a") == 0
    bench.check()
