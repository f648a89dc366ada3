"""Freed memory is reused in the order of its stream: lanes, fences, retired pages.

The host device's streams can be held, so what must wait is seen to wait.
"""

import ctypes
import threading

import pytest
import torch

from pygpukit_torch import ContextDestroyedError, DeviceError, native
from pygpukit_torch.native import Device, Tier

MB = 1 << 20


class Bench:
    """One context on a device of 64 MiB, with a side stream."""

    def __init__(self) -> None:
        self.device = native.HostDevice(64 * MB)
        self.manager = native.Manager(self.device)
        self.context = self.manager.create_context("a", 64 * MB)
        self.side = self.device.create_stream()
        self.other = self.device.create_stream()

    def used(self, context: native.Context | None = None) -> int:
        return self.manager.usage(context or self.context).used

    def resident(self, context: native.Context | None = None) -> int:
        return self.manager.usage(context or self.context).resident


@pytest.fixture
def bench() -> Bench:
    return Bench()


def finishes_within(seconds: float, call: object) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)  # type: ignore[arg-type]
    thread.start()
    thread.join(seconds)
    return thread


def test_each_stream_reuses_its_own(bench: Bench) -> None:
    context = bench.context
    own, side = context.allocate(4 * MB), context.allocate(4 * MB, bench.side)
    assert context.streams == [context.stream, bench.side]
    context.free(own)
    context.free(side)
    assert context.allocate(4 * MB, bench.side) == side
    assert context.allocate(4 * MB) == own
    bench.manager.check_invariants()


def test_another_streams_memory_is_taken_in_order_when_nothing_else_is_left(bench: Bench) -> None:
    context = bench.context
    block = context.allocate(60 * MB, bench.side)
    source = ctypes.create_string_buffer(b"old!", 4)
    bench.device.hold(bench.side)
    bench.device.copy(block, ctypes.addressof(source), 4, bench.side)
    context.free(block)
    # Taken at once, without blocking, but what the context's stream does there comes after.
    again = context.allocate(60 * MB)
    assert again == block
    fresh = ctypes.create_string_buffer(b"new!", 4)
    bench.device.copy(again, ctypes.addressof(fresh), 4, context.stream)
    assert ctypes.string_at(again, 4) == bytes(4)
    bench.device.let_go(bench.side)
    assert ctypes.string_at(again, 4) == b"new!"
    bench.manager.check_invariants()


def test_a_block_freed_while_another_stream_may_use_it_is_kept_back(bench: Bench) -> None:
    context = bench.context
    block = context.allocate(4 * MB)
    bench.device.hold(bench.other)
    context.free_after(block, [bench.other])
    assert bench.used() == 0
    assert bench.manager.totals().fenced == 4 * MB
    assert context.allocate(4 * MB) != block
    bench.device.let_go(bench.other)
    taken = {context.allocate(4 * MB) for _ in range(15)}
    assert block in taken
    bench.manager.check_invariants()


def test_recorded_uses_keep_a_block_back(bench: Bench) -> None:
    context = bench.context
    block = context.allocate(4 * MB)
    context.record_use(block, bench.side)
    context.record_use(block, bench.other)
    context.record_use(block, bench.side)
    context.record_use(block, context.stream)  # its own: says nothing
    for stream in (bench.side, bench.other):
        bench.device.hold(stream)
    context.free(block)
    bench.device.let_go(bench.side)
    assert context.allocate(4 * MB) != block
    bench.device.let_go(bench.other)
    assert block in {context.allocate(4 * MB) for _ in range(15)}
    context.record_use(0, bench.side)  # no block of the context's: does nothing
    context.record_use(block + 512, bench.side)
    bench.manager.check_invariants()


def test_streams_that_are_done_keep_nothing_back(bench: Bench) -> None:
    block = bench.context.allocate(4 * MB)
    bench.context.free_after(block, [bench.other, bench.context.stream])
    assert bench.context.allocate(4 * MB) == block


def test_a_request_waits_for_fenced_memory_rather_than_fail(bench: Bench) -> None:
    context = bench.context
    block = context.allocate(60 * MB)
    bench.device.hold(bench.other)
    context.free_after(block, [bench.other])
    assert context.try_allocate(60 * MB, may_wait=False) == 0
    got: list[int] = []
    thread = finishes_within(0.1, lambda: got.append(context.allocate(60 * MB)))
    assert thread.is_alive()
    # Nobody is held up by who waits.
    assert bench.used() == 0
    context.free(context.allocate(2 * MB))
    bench.device.let_go(bench.other)
    thread.join(10)
    assert len(got) == 1
    bench.manager.check_invariants()


def test_what_cannot_help_is_not_waited_for(bench: Bench) -> None:
    context = bench.context
    block = context.allocate(20 * MB)
    bench.device.hold(bench.other)
    context.free_after(block, [bench.other])
    with pytest.raises(torch.OutOfMemoryError):
        context.allocate(65 * MB)


def test_pages_leave_a_context_only_when_its_stream_has_passed(bench: Bench) -> None:
    other = bench.manager.create_context("b", 64 * MB)
    block = bench.context.allocate(60 * MB)
    source = ctypes.create_string_buffer(b"late", 4)
    bench.device.hold(bench.context.stream)
    bench.device.copy(block, ctypes.addressof(source), 4, bench.context.stream)
    bench.context.free(block)
    got: list[int] = []
    thread = finishes_within(0.1, lambda: got.append(other.allocate(50 * MB)))
    assert thread.is_alive(), "pages were taken while work was using them"
    assert bench.resident() == 60 * MB
    bench.manager.check_invariants()
    bench.device.let_go(bench.context.stream)
    thread.join(10)
    assert len(got) == 1
    assert bench.resident() < 60 * MB
    bench.manager.check_invariants()


def test_a_reservation_waits_for_pages_that_are_on_their_way(bench: Bench) -> None:
    block = bench.context.allocate(60 * MB)
    bench.device.hold(bench.context.stream)
    bench.context.free(block)
    made: list[native.Context] = []

    def create() -> None:
        made.append(bench.manager.create_context("b", 40 * MB, 40 * MB, Tier.guaranteed))

    thread = finishes_within(0.1, create)
    assert thread.is_alive()
    bench.device.let_go(bench.context.stream)
    thread.join(10)
    assert bench.manager.usage(made[0]).base == 40 * MB
    bench.manager.check_invariants()


def test_shrinking_waits_for_pages_that_are_on_their_way(bench: Bench) -> None:
    block = bench.context.allocate(60 * MB)
    bench.device.hold(bench.context.stream)
    bench.context.free(block)
    thread = finishes_within(0.1, lambda: bench.manager.resize_context(bench.context, 10 * MB, 0))
    assert thread.is_alive()
    bench.device.let_go(bench.context.stream)
    thread.join(10)
    assert bench.manager.usage(bench.context).max == 10 * MB
    assert bench.resident() <= 10 * MB
    bench.manager.check_invariants()


def test_trim_gives_back_what_no_reservation_needs(bench: Bench) -> None:
    reserved = bench.manager.create_context("b", 16 * MB, 16 * MB, Tier.guaranteed)
    reserved.free(reserved.allocate(16 * MB))
    bench.context.free(bench.context.allocate(30 * MB))
    kept = bench.context.allocate(2 * MB, bench.side)
    assert bench.manager.totals().existing == 48 * MB
    freed = bench.manager.trim()
    assert freed == 48 * MB - bench.manager.totals().existing == 30 * MB
    assert bench.resident() == 2 * MB
    bench.context.free(kept)
    bench.manager.check_invariants()


def test_totals_survive_their_contexts(bench: Bench) -> None:
    bench.context.free(bench.context.allocate(30 * MB))
    block = bench.context.allocate(4 * MB)
    before = bench.manager.totals()
    assert before.counters.allocations == 2
    assert before.counters.allocated_bytes == 34 * MB
    assert (before.used, before.peak, before.live_blocks) == (4 * MB, 30 * MB, 1)
    assert before.created - before.existing == 0
    bench.context.free(block)
    bench.manager.destroy_context(bench.context)
    after = bench.manager.totals()
    assert after.counters.frees == after.counters.allocations == 2
    assert (after.used, after.pages, after.existing) == (0, 0, 0)
    assert after.created == before.created
    assert after.existing_peak == before.existing_peak
    bench.manager.reset_peaks()
    assert bench.manager.totals().existing_peak == 0


def test_events_are_recorded_once_a_capture_is_over(bench: Bench) -> None:
    """Nothing may be recorded on a stream that is captured: the fence waits until it can be."""
    context = bench.context
    block = context.allocate(60 * MB)
    bench.device.set_capturing(bench.other, True)
    context.free_after(block, [bench.other])
    recorded = bench.device.count(Device.Call.record)
    with pytest.raises(torch.OutOfMemoryError):
        context.allocate(60 * MB)
    assert bench.device.count(Device.Call.record) == recorded
    bench.device.set_capturing(bench.other, False)
    assert context.allocate(60 * MB) == block


def test_pages_of_a_captured_stream_stay(bench: Bench) -> None:
    context, other = bench.context, bench.manager.create_context("b", 64 * MB)
    context.free(context.allocate(60 * MB))
    bench.device.set_capturing(context.stream, True)
    with pytest.raises(torch.OutOfMemoryError):
        other.allocate(20 * MB)
    assert bench.resident() == 60 * MB
    bench.device.set_capturing(context.stream, False)
    other.allocate(20 * MB)
    bench.manager.check_invariants()


@pytest.mark.parametrize("call", ["record", "synchronize", "wait", "unmap", "map", "create"])
def test_failures_on_the_way_lose_nothing(bench: Bench, call: str) -> None:
    context = bench.context
    for _ in range(2):
        block = context.allocate(60 * MB, bench.side)
        bench.device.hold(bench.side)
        fenced = context.allocate(2 * MB)
        context.free_after(fenced, [bench.side])
        context.free(block)
        bench.device.inject_fault(1, Device.Call.__members__[call])
        timer = threading.Timer(0.02, bench.device.let_go, [bench.side])
        timer.start()
        try:
            context.free(context.allocate(61 * MB))
        except (torch.OutOfMemoryError, DeviceError):
            bench.manager.check_invariants()
        timer.join()
        bench.device.inject_fault(0, Device.Call.__members__[call])
        context.free(context.allocate(61 * MB))
        bench.manager.trim()
        bench.manager.check_invariants()
        assert bench.used() == 0


def test_a_block_comes_back_as_soon_as_its_streams_have_passed(bench: Bench) -> None:
    """As torch does it, whose tests expect the same address; also where there is other room."""
    context = bench.context
    block = context.allocate(MB)
    bench.device.hold(bench.side)
    context.record_use(block, bench.side)
    context.free(block)
    other = context.allocate(MB)
    assert other != block
    bench.device.let_go(bench.side)
    assert context.allocate(MB) == block
    context.free(other)
    bench.manager.check_invariants()


def test_a_segment_is_idle_memory_in_a_place_of_its_own(bench: Bench) -> None:
    """Stream 0 stands for no stream: private pools of torch divide such memory themselves."""
    context = bench.context
    block = context.allocate(4 * MB)
    context.free(block)
    segment = context.allocate(4 * MB, 0)
    assert abs(segment - block) >= 128 * MB
    context.free(segment)
    assert context.allocate(4 * MB, 0) == segment
    assert context.streams == [context.stream]
    bench.device.hold(bench.side)
    context.free_after(segment, [context.stream, bench.side])
    assert context.try_allocate(62 * MB, 0, may_wait=False) == 0
    bench.device.let_go(bench.side)
    assert context.try_allocate(62 * MB, 0, may_wait=False)
    bench.manager.check_invariants()


def test_pages_go_from_one_zone_to_the_other(bench: Bench) -> None:
    context = bench.context
    context.free(context.allocate(60 * MB))
    segment = context.allocate(60 * MB, 0)
    context.free(segment)
    assert context.allocate(60 * MB)
    bench.manager.check_invariants()


def test_a_side_stream_near_the_budget_gets_what_fits(bench: Bench) -> None:
    """Free memory of the requesting stream beside the planned pages stays with it."""
    context = bench.manager.create_context("tight", 20 * MB)
    blocks = [context.allocate(2 * MB, bench.side) for _ in range(10)]
    for index in (0, 2, 4, 5, 6, 8, 9):
        context.free(blocks[index])
    assert context.allocate(10 * MB, bench.side)
    bench.manager.check_invariants()


def test_a_destroyed_contexts_stream_holds_nothing_back(bench: Bench) -> None:
    other = bench.manager.create_context("other", 8 * MB)
    stream = other.stream
    used_there = bench.context.allocate(30 * MB)
    made_for_it = bench.context.allocate(30 * MB, stream)
    bench.context.record_use(used_there, stream)
    bench.manager.destroy_context(other)
    bench.context.free(used_there)
    bench.context.free(made_for_it)
    assert bench.context.allocate(62 * MB)
    bench.manager.check_invariants()


def test_who_is_over_the_own_budget_does_not_wait_for_others(bench: Bench) -> None:
    tight = bench.manager.create_context("tight", 8 * MB)
    tight.allocate(8 * MB)
    block = bench.context.allocate(50 * MB)
    bench.device.hold(bench.context.stream)
    bench.context.free(block)
    assert bench.manager.create_context("other", 40 * MB).try_allocate(30 * MB, may_wait=False) == 0
    assert bench.manager.totals().pages > 20  # retired, not gone
    with pytest.raises(torch.OutOfMemoryError):
        tight.allocate(2 * MB)
    bench.device.let_go(bench.context.stream)


def test_a_request_of_a_context_that_goes_meanwhile(bench: Bench) -> None:
    context = bench.context
    block = context.allocate(60 * MB)
    bench.device.hold(bench.other)
    context.free_after(block, [bench.other])
    errors: list[BaseException] = []

    def request() -> None:
        try:
            context.allocate(60 * MB)
        except BaseException as error:
            errors.append(error)

    thread = finishes_within(0.1, request)
    bench.manager.destroy_context(context)
    bench.device.let_go(bench.other)
    thread.join(10)
    assert [type(error) for error in errors] == [ContextDestroyedError]


def test_peaks_of_contexts_that_are_gone_count_until_the_reset(bench: Bench) -> None:
    for _ in range(3):
        other = bench.manager.create_context("other", 20 * MB)
        other.free(other.allocate(20 * MB))
        bench.manager.destroy_context(other)
    assert bench.manager.totals().peak == 20 * MB
    bench.manager.reset_peaks()
    assert bench.manager.totals().peak == 0


def test_pages_that_lanes_share_come_free_together(bench: Bench) -> None:
    context = bench.context
    first = context.allocate(MB)
    second = context.allocate(MB, bench.side)
    context.free(first)
    context.free(second)
    context.free(context.allocate(60 * MB))  # takes the one's share of a page from the other
    context.free(context.allocate(MB, bench.side))
    bench.manager.destroy_context(context)
    assert bench.manager.device_usage().contexts == []


def test_a_device_that_fails_while_a_context_shrinks_is_named(bench: Bench) -> None:
    context = bench.context
    context.free(context.allocate(60 * MB))
    bench.device.inject_fault(1, Device.Call.unmap)
    with pytest.raises(DeviceError, match=r"resized to 10.00 MiB: .* unmap .* injected fault"):
        bench.manager.resize_context(context, 10 * MB, 0)
    bench.manager.check_invariants()
    bench.manager.resize_context(context, 10 * MB, 0)


# Memory that work on any stream may still use ----------------------------------------------------


def kept_back(bench: Bench, size: int) -> int:
    """A block that is free once the other stream, which stands for all, has passed."""
    block = bench.context.allocate(size)
    bench.device.hold(bench.other)
    bench.context.free_after_event(block, bench.device.record(bench.other))
    return block


def test_a_block_that_any_stream_may_use_is_free_after_its_event(bench: Bench) -> None:
    block = kept_back(bench, 4 * MB)
    assert bench.context.allocate(4 * MB) != block
    bench.device.let_go(bench.other)
    assert bench.context.allocate(4 * MB) == block
    bench.manager.check_invariants()


def test_it_is_waited_for_last_of_all(bench: Bench) -> None:
    block = kept_back(bench, 16 * MB)
    # The device has more, and nobody waits.
    thread = finishes_within(10, lambda: bench.context.allocate(30 * MB))
    assert not thread.is_alive()
    # Now only the block can help.
    thread = finishes_within(0.1, lambda: bench.context.allocate(34 * MB))
    assert thread.is_alive()
    bench.device.let_go(bench.other)
    thread.join(10)
    assert not thread.is_alive()
    assert bench.used() == 64 * MB
    assert bench.context.block_bytes(block) in (0, 34 * MB)
    bench.manager.check_invariants()


def test_who_is_over_its_budget_is_refused_at_once(bench: Bench) -> None:
    kept_back(bench, 16 * MB)
    blocks = [bench.context.allocate(16 * MB)]
    with pytest.raises(torch.OutOfMemoryError):
        bench.context.allocate(49 * MB)
    bench.device.let_go(bench.other)
    with pytest.raises(torch.OutOfMemoryError):
        bench.context.allocate(49 * MB)
    blocks.append(bench.context.allocate(48 * MB))
    bench.manager.check_invariants()


def test_what_is_done_already_is_free_at_once(bench: Bench) -> None:
    block = bench.context.allocate(4 * MB)
    bench.context.free_after_event(block, bench.device.record(bench.other))
    assert bench.context.allocate(4 * MB) == block
    bench.manager.check_invariants()
