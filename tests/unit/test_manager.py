"""The manager on a host device: budgets, reservations, reuse between contexts, failures."""

import contextlib
import ctypes
import random
import threading
from collections.abc import Callable

import pytest
import torch

from pygpukit_torch import (
    AdmissionError,
    ContextBusyError,
    ContextDestroyedError,
    DeviceError,
    native,
)
from pygpukit_torch.native import Device, Tier

MB = 1 << 20
PAGE = 2 * MB


class Fixture:
    def __init__(self, capacity: int = 64 * MB) -> None:
        self.device = native.HostDevice(capacity)
        self.manager = native.Manager(self.device)

    def create(
        self, name: str, budget: int, base: int = 0, tier: Tier | None = None
    ) -> native.Context:
        if tier is None:
            tier = Tier.guaranteed if base == budget else Tier.burstable
        return self.manager.create_context(name, budget, base, tier)

    def resident(self, context: native.Context) -> int:
        return self.manager.usage(context).resident


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def test_memory_is_usable_and_budgeted(fixture: Fixture) -> None:
    context = fixture.create("a", 8 * MB)
    blocks = [context.allocate(MB) for _ in range(8)]
    for index, block in enumerate(blocks):
        ctypes.memset(block, index, MB)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"allocate 1 bytes.*'a' .* has 8.00 MiB of its budget of 8.00"
    ):
        context.allocate(1)
    assert [ctypes.string_at(block, 1)[0] for block in blocks] == list(range(8))
    context.free(blocks.pop())
    context.allocate(MB)
    fixture.manager.check_invariants()


def test_the_error_names_who_what_and_how_much(fixture: Fixture) -> None:
    first = fixture.create("first", 8 * MB, 8 * MB)
    second = fixture.create("second", 64 * MB)
    block = first.allocate(3 * MB)
    second.allocate(50 * MB)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        second.allocate(12 * MB)
    text = str(caught.value)
    assert "you tried to allocate 12582912 bytes" in text
    assert "Context 'second' (burstable) has 50.00 MiB of its budget of 64.00 MiB in use" in text
    assert "total capacity of 64.00 MiB" in text
    assert "first 4.00 MiB (guaranteed, base 8.00 MiB)" in text
    first.free(block)


def test_a_reservation_is_physical_and_cannot_be_taken(fixture: Fixture) -> None:
    reserved = fixture.create("reserved", 32 * MB, 32 * MB)
    greedy = fixture.create("greedy", 64 * MB)
    assert fixture.manager.device_usage().pooled == 32 * MB
    greedy.allocate(32 * MB)
    with pytest.raises(torch.OutOfMemoryError):
        greedy.allocate(PAGE)
    created = fixture.device.count(Device.Call.create)
    reserved.allocate(32 * MB)
    assert fixture.device.count(Device.Call.create) == created
    fixture.manager.check_invariants()


def test_reservations_that_do_not_fit_are_refused_with_figures(fixture: Fixture) -> None:
    fixture.create("a", 40 * MB, 40 * MB)
    with pytest.raises(AdmissionError, match=r"'b'.*30\.00 MiB does not fit: 24\.00 MiB .* 64\.00"):
        fixture.create("b", 30 * MB, 30 * MB)
    with pytest.raises(AdmissionError):
        fixture.create("b", 100 * MB, 100 * MB)
    fixture.create("b", 24 * MB, 24 * MB)
    fixture.manager.check_invariants()


def test_cached_pages_go_to_whoever_needs_them(fixture: Fixture) -> None:
    hoarder = fixture.create("hoarder", 64 * MB)
    hoarder.free(hoarder.allocate(60 * MB))
    assert fixture.resident(hoarder) == 60 * MB
    needy = fixture.create("needy", 64 * MB)
    needy.allocate(20 * MB)
    assert fixture.resident(hoarder) == 44 * MB
    fixture.create("guaranteed", 44 * MB, 44 * MB)
    assert fixture.resident(hoarder) == 0
    fixture.manager.check_invariants()


def test_live_memory_of_others_is_left_alone(fixture: Fixture) -> None:
    holder = fixture.create("holder", 64 * MB)
    block = holder.allocate(60 * MB)
    ctypes.memset(block, 7, 60 * MB)
    other = fixture.create("other", 64 * MB)
    with pytest.raises(torch.OutOfMemoryError):
        other.allocate(10 * MB)
    assert ctypes.string_at(block + 59 * MB, 2) == b"\7\7"


def test_a_budget_that_is_fragmented_over_pages_is_used_again(fixture: Fixture) -> None:
    """Every second page is free, and a block of all of them is asked for."""
    context = fixture.create("a", 32 * MB)
    blocks = [context.allocate(PAGE) for _ in range(16)]
    for block in blocks[::2]:
        context.free(block)
    context.allocate(16 * MB)
    assert fixture.resident(context) == 32 * MB
    fixture.manager.check_invariants()


def fragmented(context: native.Context) -> None:
    """Sixteen pages, every other one free."""
    blocks = [context.allocate(PAGE) for _ in range(16)]
    for block in blocks[::2]:
        context.free(block)


def test_own_free_pages_come_before_new_ones(fixture: Fixture) -> None:
    context = fixture.create("a", 64 * MB)
    fragmented(context)
    block = context.allocate(5 * PAGE)
    ctypes.memset(block, 7, 5 * PAGE)
    # A 32nd more than its peak may be held, in whole pages.
    assert (fixture.resident(context), context.counters.pages_unmapped) == (17 * PAGE, 4)
    context.allocate(3 * PAGE)
    assert (fixture.resident(context), context.counters.pages_unmapped) == (17 * PAGE, 7)
    context.allocate(2 * PAGE)  # more than was ever used
    assert fixture.resident(context) == 19 * PAGE
    fixture.manager.check_invariants()


def test_nobody_waits_for_own_free_pages_while_there_are_new_ones(fixture: Fixture) -> None:
    context = fixture.create("a", 64 * MB)
    fragmented(context)
    fixture.device.hold(context.stream)
    context.allocate(5 * PAGE)
    assert (fixture.resident(context), context.counters.pages_unmapped) == (21 * PAGE, 0)
    fixture.device.let_go(context.stream)


def test_pages_of_a_base_stay_where_they_are(fixture: Fixture) -> None:
    context = fixture.create("a", 64 * MB, 21 * PAGE)
    fragmented(context)
    context.allocate(5 * PAGE)
    assert (fixture.resident(context), context.counters.pages_unmapped) == (21 * PAGE, 0)


def test_streams_that_take_turns_keep_their_pages(fixture: Fixture) -> None:
    context = fixture.create("a", 64 * MB)
    side = fixture.device.create_stream()
    for stream in (context.stream, side) * 3:
        context.free(context.allocate(5 * PAGE, stream))
    assert (fixture.resident(context), context.counters.pages_unmapped) == (10 * PAGE, 0)


def test_what_is_left_over_is_told_when_it_cannot_be_used(fixture: Fixture) -> None:
    context = fixture.create("a", 8 * MB)
    blocks = [context.allocate(MB) for _ in range(8)]
    for block in blocks[::2]:
        context.free(block)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"4\.00 MiB could be had, fragmented over pages of 2"
    ):
        context.allocate(2 * MB)


def test_usage_tells_what_could_be_had(fixture: Fixture) -> None:
    a = fixture.create("a", 64 * MB, 16 * MB)
    b = fixture.create("b", 64 * MB)
    assert fixture.manager.device_usage().available == 48 * MB
    assert fixture.manager.usage(a).available == 64 * MB
    assert fixture.manager.usage(b).available == 48 * MB
    block = b.allocate(40 * MB)
    assert fixture.manager.usage(a).available == 24 * MB
    b.free(block)
    assert fixture.resident(b) == 40 * MB
    assert fixture.manager.usage(a).available == 64 * MB
    assert fixture.manager.device_usage().available == 48 * MB
    fixture.create("c", 48 * MB, 48 * MB)


def test_a_destroyed_context_keeps_only_what_lives(fixture: Fixture) -> None:
    context = fixture.create("a", 32 * MB, 32 * MB)
    kept, freed = context.allocate(MB), context.allocate(20 * MB)
    context.free(freed)
    ctypes.memset(kept, 5, MB)
    fixture.manager.destroy_context(context)
    usage = fixture.manager.device_usage()
    assert [(c.name, c.orphan, c.used, c.resident) for c in usage.contexts] == [
        ("a", True, MB, PAGE)
    ]
    assert usage.available == 62 * MB
    again = fixture.create("a", 62 * MB, 62 * MB)
    again.allocate(60 * MB)
    assert ctypes.string_at(kept, 1) == b"\5"
    with pytest.raises(ContextDestroyedError):
        context.allocate(1)
    with pytest.raises(ContextDestroyedError):
        fixture.manager.destroy_context(context)
    fixture.manager.check_invariants()
    context.free(kept)
    assert len(fixture.manager.device_usage().contexts) == 1
    with pytest.raises(ContextDestroyedError):
        fixture.manager.usage(context)
    fixture.manager.check_invariants()


def test_an_orphan_outlives_every_reference_to_its_manager() -> None:
    fixture = Fixture()
    context = fixture.create("a", 8 * MB)
    block = context.allocate(MB)
    fixture.manager.destroy_context(context)
    del fixture
    ctypes.memset(block, 1, MB)
    context.free(block)


def test_open_sessions_keep_a_context_from_being_destroyed(fixture: Fixture) -> None:
    context = fixture.create("a", 8 * MB)
    session = native.Session(context)
    session.enter()
    with pytest.raises(ContextBusyError, match="1 open session"):
        fixture.manager.destroy_context(context)
    session.exit()
    fixture.manager.destroy_context(context)
    with pytest.raises(ContextDestroyedError):
        session.enter()


def test_resize(fixture: Fixture) -> None:
    context = fixture.create("a", 16 * MB)
    block = context.allocate(10 * MB)
    with pytest.raises(ValueError, match=r"cannot be resized to 8\.00 MiB: .* 10\.00 MiB"):
        fixture.manager.resize_context(context, 8 * MB, 0)
    fixture.manager.resize_context(context, 10 * MB, 0)
    with pytest.raises(torch.OutOfMemoryError):
        context.allocate(MB)
    fixture.manager.resize_context(context, 40 * MB, 40 * MB // 2)
    assert fixture.manager.device_usage().pooled == 10 * MB
    context.allocate(30 * MB)
    with pytest.raises(AdmissionError):
        fixture.manager.resize_context(fixture.create("b", 60 * MB), 60 * MB, 30 * MB)
    context.free(block)
    fixture.manager.resize_context(context, 30 * MB, 0)
    assert fixture.resident(context) == 30 * MB
    fixture.manager.check_invariants()


def test_resizing_a_reservation_takes_what_others_only_cache(fixture: Fixture) -> None:
    hoarder = fixture.create("hoarder", 64 * MB)
    hoarder.free(hoarder.allocate(64 * MB))
    context = fixture.create("a", 8 * MB)
    fixture.manager.resize_context(context, 40 * MB, 40 * MB)
    assert fixture.resident(hoarder) == 24 * MB
    fixture.manager.check_invariants()


@pytest.mark.parametrize("small_first", [True, False])
def test_contexts_of_different_page_sizes_share_the_device(small_first: bool) -> None:
    """What one context gave up must serve another whose pages are larger, or smaller."""
    fixture = Fixture(2048 * MB)
    small, large = fixture.create("small", 100 * MB), fixture.create("large", 2048 * MB)
    assert (small.page_bytes, large.page_bytes) == (2 * MB, 32 * MB)
    first, second = (small, large) if small_first else (large, small)
    for context, size in ((first, 96 * MB), (second, 96 * MB)) * 3:
        context.free(context.allocate(size))
    rest = large.allocate(2048 * MB - 96 * MB)
    fixture.manager.check_invariants()
    blocks = [small.allocate(2 * MB) for _ in range(48)]
    with pytest.raises(torch.OutOfMemoryError):
        large.allocate(32 * MB)
    for block in blocks:
        small.free(block)
    large.free(rest)
    large.allocate(2048 * MB)
    fixture.manager.check_invariants()


@pytest.mark.parametrize(
    ("budget", "base", "tier", "text"),
    [
        (MB, 0, Tier.burstable, "less than one page of 2.00 MiB"),
        (8 * MB, 16 * MB, Tier.burstable, "base_vram of 16.00 MiB is above max_vram"),
        (8 * MB, 4 * MB, Tier.guaranteed, "reserves all of its max_vram"),
        (8 * MB, 4 * MB, Tier.best_effort, "must be 0"),
        (65 * MB, 0, Tier.burstable, "exceeds the device's capacity of 64.00 MiB"),
    ],
)
def test_sizes_that_make_no_sense(
    fixture: Fixture, budget: int, base: int, tier: Tier, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        fixture.create("a", budget, base, tier)
    good = fixture.create("a", 8 * MB)
    with pytest.raises(ValueError, match="exists already"):
        fixture.create("a", 8 * MB)
    with pytest.raises(ValueError, match="needs a name"):
        fixture.create("", 8 * MB)
    assert fixture.manager.device_usage().available == 64 * MB
    fixture.manager.destroy_context(good)


def test_freeing_what_is_not_live_is_refused(fixture: Fixture) -> None:
    context = fixture.create("a", 8 * MB)
    block = context.allocate(MB)
    for wrong in (block + 512, block + 1, block - MB, 0, 12345):
        with pytest.raises(ValueError, match="no live block"):
            context.free(wrong)
    context.free(block)
    with pytest.raises(ValueError, match="no live block"):
        context.free(block)
    fixture.manager.check_invariants()


@pytest.mark.parametrize(
    ("small", "large", "reserved"),
    [(64, 192, 128), (64, 192, 256), (128, 128, 192), (32, 224, 250)],
)
def test_a_reservation_beside_spare_pages_of_other_sizes(
    small: int, large: int, reserved: int
) -> None:
    """The device is full of cached pages of two sizes; the reservation needs those of one."""
    fixture = Fixture(256 * MB)
    first, second = fixture.create("first", 128 * MB), fixture.create("second", 256 * MB)
    assert (first.page_bytes, second.page_bytes) == (2 * MB, 4 * MB)
    first.free(first.allocate(small * MB))
    second.free(second.allocate(large * MB))
    context = fixture.create("reserved", reserved * MB, reserved * MB)
    fixture.manager.check_invariants()
    context.allocate(reserved * MB // context.page_bytes * context.page_bytes)
    fixture.manager.check_invariants()


def test_a_request_beyond_its_own_budget_costs_others_nothing(fixture: Fixture) -> None:
    other = fixture.create("other", 64 * MB)
    other.free(other.allocate(40 * MB))
    context = fixture.create("a", 16 * MB)
    context.allocate(10 * MB)
    with pytest.raises(torch.OutOfMemoryError):
        context.allocate(10 * MB)
    assert fixture.resident(other) == 40 * MB


def test_a_refusal_costs_others_nothing(fixture: Fixture) -> None:
    holder = fixture.create("holder", 64 * MB)
    holder.allocate(20 * MB)
    hoarder = fixture.create("hoarder", 64 * MB)
    hoarder.free(hoarder.allocate(40 * MB))
    with pytest.raises(torch.OutOfMemoryError):
        fixture.create("a", 64 * MB).allocate(50 * MB)
    with pytest.raises(AdmissionError):
        fixture.create("b", 50 * MB, 50 * MB)
    assert (fixture.resident(hoarder), fixture.resident(holder)) == (40 * MB, 20 * MB)
    fixture.manager.check_invariants()


def test_a_context_cannot_be_resized_below_one_of_its_pages() -> None:
    fixture = Fixture(4096 * MB)
    context = fixture.create("a", 4096 * MB)
    with pytest.raises(
        ValueError, match=r"pages of 32\.00 MiB and cannot be resized to 16\.00 MiB"
    ):
        fixture.manager.resize_context(context, 16 * MB, 0)
    fixture.manager.resize_context(context, 32 * MB, 0)
    context.allocate(32 * MB)


def test_a_thousand_contexts_fit_the_addresses_of_a_process() -> None:
    fixture = Fixture(80 * 1024 * MB)
    contexts = [fixture.create(str(number), 8 * MB) for number in range(1000)]
    contexts[-1].allocate(8 * MB)
    with pytest.raises(ValueError, match=r"max_vram of at most 16\.00 GiB, not 16\.01 GiB"):
        fixture.manager.resize_context(contexts[0], 16400 * MB, 0)
    fixture.manager.resize_context(contexts[0], 16 * 1024 * MB, 0)
    fixture.manager.check_invariants()


def test_a_context_can_grow_sixteenfold_and_fill_that() -> None:
    fixture = Fixture(80 * 1024 * MB)
    context = fixture.create("a", 2048 * MB)
    with pytest.raises(ValueError, match=r"at most 32\.00 GiB, not 32\.01 GiB"):
        fixture.manager.resize_context(context, 32 * 1024 * MB + 16 * MB, 0)
    fixture.manager.resize_context(context, 32 * 1024 * MB, 1024 * MB)
    segments = [context.allocate(2048 * MB, 0) for _ in range(16)]
    for segment in segments[::2]:
        context.free(segment)
    for _ in range(4):  # none fits a gap
        context.allocate(4096 * MB, 0)
    fixture.manager.check_invariants()


def test_no_host_memory_is_made_for_the_budget_of_a_destroyed_context() -> None:
    fixture = Fixture(64 * MB)
    gone = fixture.create("gone", 48 * MB)
    block = gone.allocate(1024)
    fixture.manager.destroy_context(gone)
    usage = fixture.manager.device_usage()
    assert [(each.name, each.orphan, each.max) for each in usage.contexts] == [
        ("gone", True, 2 * MB)
    ]
    fixture.manager.check_invariants()
    gone.free(block)
    assert not fixture.manager.device_usage().contexts


def test_a_reservation_stays_physical_where_smaller_pages_of_it_are_lent() -> None:
    manager = native.Manager(native.HostDevice(512 * MB), host_backup=512 * MB)
    manager.create_context("reserved", 448 * MB, 448 * MB, Tier.guaranteed)  # in pages of 4 MiB
    small = manager.create_context("small", 32 * MB, 0, Tier.burstable)  # of 2 MiB
    large = manager.create_context("large", 256 * MB, 0, Tier.burstable)
    small.allocate(MB)
    large.allocate(64 * MB)
    manager.check_invariants()
    usage = manager.device_usage()
    assert usage.resident == 66 * MB
    assert usage.pooled == 446 * MB  # and 2 are lent


def test_a_base_gets_back_what_is_lent_first() -> None:
    manager = native.Manager(native.HostDevice(32 * MB), host_backup=32 * MB)
    borrower = manager.create_context("borrower", 8 * MB, 0, Tier.burstable)
    reserved = 51 * MB // 2
    manager.create_context("reserved", reserved, reserved, Tier.guaranteed)
    borrower.free(borrower.allocate(8 * MB))  # 1.5 MiB of it are lent
    manager.create_context("new", 2 * MB, MB, Tier.burstable)
    assert manager.usage(borrower).resident == 4 * MB
    manager.check_invariants()


def test_free_pages_within_a_base_cannot_be_lent_without_host_memory(fixture: Fixture) -> None:
    reserved = fixture.create("reserved", 60 * MB, 60 * MB)
    reserved.free(reserved.allocate(4 * MB))
    fixture.create("other", 4 * MB, 3 * MB)
    small = fixture.create("small", 2 * MB)
    assert fixture.manager.usage(small).available == 0
    with pytest.raises(torch.OutOfMemoryError):
        small.allocate(1)


def test_contexts_belong_to_their_manager(fixture: Fixture) -> None:
    other = Fixture()
    context, namesake = fixture.create("a", 8 * MB), other.create("a", 8 * MB)
    for call in (
        lambda: fixture.manager.destroy_context(namesake),
        lambda: fixture.manager.resize_context(namesake, 16 * MB, 0),
    ):
        with pytest.raises(ValueError, match="belongs to another device"):
            call()
    assert fixture.manager.usage(context).max == 8 * MB
    other.manager.check_invariants()


def test_misuse_of_the_native_names_raises(fixture: Fixture) -> None:
    context = fixture.create("a", 8 * MB)
    with pytest.raises(ValueError, match="at least one byte"):
        context.allocate(0)
    for arguments in (("b", -1), (1, 8 * MB), ("b", "x"), ("\ud800", 8 * MB)):
        with pytest.raises((TypeError, ValueError)):
            fixture.manager.create_context(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        native.Manager(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        native.Session(None)  # type: ignore[arg-type]
    fixture.manager.check_invariants()


def test_blocks_may_outlive_their_manager_without_a_word() -> None:
    context = Fixture().create("a", 8 * MB)
    block = context.allocate(MB)
    ctypes.memset(block, 1, MB)
    context.free(block)


def test_an_address_range_is_anothers_at_once(fixture: Fixture) -> None:
    """Ranges are reused by whoever reserves next: owners must not be mixed up."""
    for index in range(50):
        context = fixture.create(f"c{index}", 8 * MB)
        block = context.allocate(MB)
        fixture.manager.destroy_context(context)
        successor = fixture.create(f"s{index}", 8 * MB)
        other = successor.allocate(MB)
        context.free(block)
        assert successor.block_bytes(other) == MB
        successor.free(other)
        fixture.manager.destroy_context(successor)
    fixture.manager.check_invariants()


# Failures ------------------------------------------------------------------------------------


class Tracked(Fixture):
    """Remembers what lives, so that it can be given back after a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[native.Context] = []
        self.blocks: list[tuple[native.Context, int]] = []

    def create(
        self, name: str, budget: int, base: int = 0, tier: Tier | None = None
    ) -> native.Context:
        self.contexts.append(super().create(name, budget, base, tier))
        return self.contexts[-1]

    def allocate(self, context: native.Context, size: int) -> int:
        address = context.allocate(size)
        self.blocks.append((context, address))
        ctypes.memset(address, 1, size)
        return address

    def free(self, context: native.Context, address: int) -> None:
        context.free(address)
        self.blocks.remove((context, address))

    def destroy(self, context: native.Context) -> None:
        self.manager.destroy_context(context)
        self.contexts.remove(context)


def everything(fixture: Tracked) -> None:
    """A program that makes every kind of device call; raises what the device raises."""
    reserved = fixture.create("reserved", 16 * MB, 16 * MB)
    other = fixture.create("other", 64 * MB)
    big = fixture.allocate(other, 40 * MB)
    small = fixture.allocate(reserved, 5 * MB)
    fixture.free(other, big)
    third = fixture.create("third", 30 * MB, 30 * MB)
    fixture.allocate(other, 9 * MB)
    fixture.free(reserved, small)
    fixture.allocate(third, 30 * MB)
    fixture.destroy(third)
    fixture.destroy(reserved)


LAST_CALL = 100


@pytest.mark.parametrize("n", range(1, LAST_CALL + 1))
def test_any_device_call_may_fail(n: int) -> None:
    """The n-th call fails, whichever it is: the books stay right and everything works after."""
    fixture = Tracked()
    fixture.device.inject_fault(n)
    with contextlib.suppress(torch.OutOfMemoryError, AdmissionError, DeviceError):
        everything(fixture)
    fixture.manager.check_invariants()
    fixture.device.inject_fault(0)

    # Nothing is lost: once the blocks are gone, the whole device can be reserved.
    for context, address in list(fixture.blocks):
        fixture.free(context, address)
    for context in list(fixture.contexts):
        fixture.destroy(context)
    whole = fixture.create("whole", 64 * MB, 64 * MB)
    ctypes.memset(whole.allocate(64 * MB), 1, 64 * MB)
    fixture.manager.check_invariants()


def test_the_failure_program_reaches_every_call_that_is_tried() -> None:
    """Guards the test above: its range must cover the whole program."""
    fixture = Tracked()
    everything(fixture)
    assert fixture.device.count(Device.Call.any) == LAST_CALL


@pytest.mark.parametrize("call", ["map", "create"])
def test_a_failed_growth_says_what_the_device_said_and_keeps_its_progress(call: str) -> None:
    fixture = Fixture()
    context = fixture.create("a", 16 * MB)
    fixture.device.inject_fault(3, Device.Call.__members__[call])
    with pytest.raises(torch.OutOfMemoryError, match=f"the device said: host: {call} of 2"):
        context.allocate(8 * MB)
    assert fixture.resident(context) == 4 * MB
    fixture.manager.check_invariants()
    block = context.allocate(8 * MB)
    ctypes.memset(block, 1, 8 * MB)
    context.free(block)


@pytest.mark.parametrize("call", ["create", "reserve", "create_stream"])
def test_a_context_that_cannot_be_created_is_named_and_leaves_nothing(call: str) -> None:
    fixture = Fixture()
    fixture.device.inject_fault(1, Device.Call.__members__[call])
    with pytest.raises(DeviceError, match=f"context 'a': host: {call}.* failed: injected fault"):
        fixture.create("a", 16 * MB, 16 * MB)
    assert fixture.manager.device_usage().available == 64 * MB
    fixture.manager.check_invariants()
    fixture.create("a", 64 * MB, 64 * MB)


@pytest.mark.parametrize("call", ["unmap", "release", "unreserve", "destroy_stream"])
def test_a_failure_while_destroying_is_made_up_for_later(call: str) -> None:
    fixture = Fixture()
    context = fixture.create("a", 16 * MB, 16 * MB)
    context.free(context.allocate(16 * MB))
    fixture.device.inject_fault(2 if call == "unmap" else 1, Device.Call.__members__[call])
    fixture.manager.destroy_context(context)
    fixture.manager.check_invariants()
    again = fixture.create("a", 64 * MB, 64 * MB)
    fixture.manager.check_invariants()
    again.allocate(64 * MB)
    assert len(fixture.manager.device_usage().contexts) == 1


# Slack and threads ------------------------------------------------------------------------------


def fill(context: native.Context, next_size: Callable[[], int]) -> list[int]:
    """Allocate until the first refusal."""
    blocks: list[int] = []
    with contextlib.suppress(torch.OutOfMemoryError):
        while True:
            blocks.append(context.allocate(next_size()))
    return blocks


@pytest.mark.parametrize("budget", [64 * MB, 256 * MB, 2048 * MB])
@pytest.mark.parametrize("seed", range(5))
def test_nearly_all_of_a_budget_can_be_used(budget: int, seed: int) -> None:
    """Random sizes up to a 64th of the budget: the first refusal comes at 97 % or later."""
    fixture = Fixture(budget)
    context = fixture.create("a", budget)
    choice = random.Random(seed)
    fill(context, lambda: choice.randint(1, budget // 64))
    usage = fixture.manager.usage(context)
    assert usage.used >= 0.97 * budget
    assert usage.resident <= budget
    fixture.manager.check_invariants()


@pytest.mark.parametrize("budget", [64 * MB, 256 * MB, 2048 * MB])
def test_nearly_all_of_a_budget_can_be_used_after_churn(budget: int) -> None:
    """The same after half of the blocks were freed at random, several times over."""
    fixture = Fixture(budget)
    context = fixture.create("a", budget)
    choice = random.Random(3)
    blocks: list[int] = []
    for _ in range(4):
        blocks += fill(context, lambda: choice.randint(1, budget // 64))
        choice.shuffle(blocks)
        half = len(blocks) // 2
        for block in blocks[half:]:
            context.free(block)
        del blocks[half:]
    fixture.manager.check_invariants()
    # Fragmented as it is, what is free can be filled with small blocks to the same degree.
    fill(context, lambda: choice.randint(1, budget // 4096))
    assert fixture.manager.usage(context).used >= 0.97 * budget
    fixture.manager.check_invariants()


def test_threads_allocate_in_shared_and_own_contexts() -> None:
    fixture = Fixture(256 * MB)
    shared = fixture.create("shared", 128 * MB)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            own = fixture.create(f"own-{index}", 32 * MB)
            choice = random.Random(index)
            live: list[tuple[native.Context, int, int]] = []
            for step in range(3000):
                if live and choice.random() < 0.5:
                    context, block, size = live.pop(choice.randrange(len(live)))
                    marks = ctypes.string_at(block, 1), ctypes.string_at(block + size - 1, 1)
                    assert marks == (bytes([index]),) * 2, "memory was handed out twice"
                    context.free(block)
                    continue
                context = choice.choice((own, shared))
                size = choice.choice((100, 5000, 300_000, 2_000_000))
                try:
                    block = context.allocate(size)
                except torch.OutOfMemoryError:
                    continue
                ctypes.memset(block, index, 1)
                ctypes.memset(block + size - 1, index, 1)
                live.append((context, block, size))
                if step % 500 == 0:
                    fixture.manager.check_invariants()
            for context, block, _ in live:
                context.free(block)
            fixture.manager.destroy_context(own)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert fixture.manager.usage(shared).used == 0
    fixture.manager.check_invariants()
