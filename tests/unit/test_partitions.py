"""Partitions: shares of the processors, limits of memory, and the contexts in them."""

import contextlib
import gc
import random
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    MB,
    AdmissionError,
    ContextBusyError,
    DeviceError,
    QoSPolicy,
    context_session,
    create_context,
    native,
)
from pygpukit_torch.native import (
    Device,
    Holder,
    Manager,
    PartitionConfig,
    PartitionLimits,
    PartitionManager,
    Session,
    Tier,
    plan_eviction,
)

GROUPS = [8] * 15 + [12]  # as an H100 divides its 132 SMs
ALL = 2 ** len(GROUPS) - 1


@pytest.fixture
def device() -> native.HostDevice:
    return native.HostDevice(256 * MB, GROUPS)


@pytest.fixture
def manager(device: native.HostDevice) -> Manager:
    return Manager(device, native.host_streams(), host_backup=256 * MB, claim_timeout=0.05)


@pytest.fixture
def partitions(manager: Manager) -> PartitionManager:
    return PartitionManager(PartitionConfig(256 * MB), manager)


def share(compute: float) -> PartitionLimits:
    return PartitionLimits().compute(compute)


def sms(processors: int) -> int:
    return sum(size for i, size in enumerate(GROUPS) if processors >> i & 1)


def enter(context: native.Context) -> Session:
    session = Session(context, ordered=False)
    session.enter()
    return session


# Processors -------------------------------------------------------------------------------------


def test_a_share_is_rounded_down_to_whole_groups(partitions: PartitionManager) -> None:
    assert partitions.create_partition("a", "A", share(0.5)).sm_count == 64
    assert partitions.create_partition("b", "B", share(0.1)).sm_count == 12
    assert partitions.create_partition("c", "C", share(0.2)).sm_count == 24


def test_the_last_one_takes_the_rest(partitions: PartitionManager) -> None:
    assert partitions.create_partition("a", "A", share(0.94)).sm_count == 124
    assert partitions.create_partition("b", "B", share(0.06)).sm_count == 8
    assert partitions.stats().available_compute == pytest.approx(0)


def test_processors_come_back(partitions: PartitionManager) -> None:
    for _ in range(3):
        partitions.create_partition("a", "A", share(0.75))
        partitions.create_partition("b", "B", share(0.25))
        partitions.delete_partition("a")
        assert partitions.create_partition("c", "C", share(0.75)).sm_count == 96
        partitions.delete_partition("b")
        partitions.delete_partition("c")


def test_no_two_partitions_share_a_processor(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    chance = random.Random(1)
    contexts: dict[str, native.Context] = {}
    for _ in range(100):
        for id in list(contexts):
            if chance.random() < 0.5:
                manager.destroy_context(contexts.pop(id))
                partitions.delete_partition(id)
        for id in "abcd":
            if id not in contexts:
                with contextlib.suppress(AdmissionError):
                    partitions.create_partition(id, id, share(chance.uniform(0.07, 0.5)))
                    contexts[id] = manager.create_context(id, 4 * MB, partition=id)
        taken = 0
        for id, context in contexts.items():
            processors = device.processors(context.stream)
            assert sms(processors) == partitions.get(id).sm_count
            assert taken & processors == 0
            taken |= processors
    assert len(contexts) > 1


def test_contexts_in_no_partition_get_what_is_left(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    before = manager.create_context("before", 4 * MB)
    assert device.processors(before.stream) == 0, "all, unconfined"
    partitions.create_partition("memory", "M", PartitionLimits().memory(64 * MB))
    partitions.create_partition("a", "A", share(0.5))
    inside = manager.create_context("inside", 4 * MB, partition="a")
    after = manager.create_context("after", 4 * MB)
    only_memory = manager.create_context("only memory", 4 * MB, partition="memory")
    own = device.processors(inside.stream)
    for context in (before, after, only_memory):
        assert device.processors(context.stream) == ALL & ~own
    partitions.create_partition("b", "B", share(0.5))
    for context in (before, after):
        assert device.processors(context.stream) == 0, "none are left, so they run on all"
    assert manager.is_divided_up
    partitions.delete_partition("b")
    assert device.processors(before.stream) == ALL & ~own
    assert not manager.is_divided_up


def test_a_context_in_use_gets_its_stream_when_it_is_entered_anew(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    context = manager.create_context("c", 4 * MB)
    first = context.stream
    session = enter(context)
    partitions.create_partition("a", "A", share(0.5))
    nested = enter(context)
    assert context.stream == first
    nested.exit()
    session.exit()
    assert not context.is_ready, "entering has to do something first"
    enter(context).exit()
    assert context.is_ready
    assert sms(device.processors(context.stream)) == 68
    partitions.delete_partition("a")
    assert context.stream == first, "streams are kept"


def test_the_new_stream_starts_after_the_old_one(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    context = manager.create_context("c", 8 * MB)
    old = context.stream
    address = context.allocate(MB)
    device.hold(old)
    event = device.record(old)
    context.free(address)
    partitions.create_partition("a", "A", share(0.5))
    assert context.stream != old
    # What was freed in the old stream's order is reused in the new one's.
    assert context.allocate(MB) == address
    after = device.record(context.stream)
    assert not device.is_done(after)
    device.let_go(old)
    assert device.is_done(event)
    assert device.is_done(after)
    context.free(address)
    manager.check_invariants()


def test_what_was_live_on_the_old_stream_waits_for_it_when_it_is_freed(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    """It was handed out for that stream, where it is used without saying so."""
    context = manager.create_context("c", 8 * MB)
    old = context.stream
    address = context.allocate(2 * MB)
    for id in ("a", "b"):
        partitions.create_partition(id, id, share(0.25))
    device.hold(old)
    device.record(old)
    context.free(address)
    other = context.allocate(2 * MB)
    assert other != address
    context.free(other)
    device.let_go(old)
    assert context.allocate(8 * MB), "all of it is free again"
    manager.check_invariants()


def test_an_eviction_waits_for_the_old_stream(device: native.HostDevice) -> None:
    manager = Manager(device, native.host_streams(), host_backup=256 * MB)
    partitions = PartitionManager(PartitionConfig(device.capacity), manager)
    context = manager.create_context("c", 8 * MB)
    old = context.stream
    context.allocate(2 * MB)
    partitions.create_partition("a", "A", share(0.5))
    device.hold(old)
    device.record(old)
    thread = threading.Thread(target=manager.evict_context, args=(context,), daemon=True)
    thread.start()
    try:
        thread.join(0.1)
        assert thread.is_alive()
    finally:
        device.let_go(old)
        thread.join(30)
    assert manager.usage(context).evicted == 2 * MB


def test_captures_have_a_stream_of_their_own(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", share(0.5))
    inside = manager.create_context("inside", 4 * MB, partition="a")
    stream = inside.capture_stream()
    assert stream not in (0, inside.stream)
    assert device.processors(stream) == device.processors(inside.stream)
    assert inside.capture_stream() == stream
    partitions.assign(inside, None)
    partitions.delete_partition("a")
    assert inside.capture_stream() not in (0, stream, inside.stream)


def test_a_device_that_fails_changes_nothing(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    context = manager.create_context("c", 4 * MB)
    stream = context.stream
    device.inject_fault(1, Device.Call.create_stream)
    with pytest.raises(DeviceError, match=r"partition 'a': .*create_stream"):
        partitions.create_partition("a", "A", share(0.5))
    assert partitions.partition_ids == []
    assert partitions.stats().available_compute == 1
    assert context.stream == stream
    manager.check_invariants()


def test_a_stream_that_could_not_be_had_is_asked_for_on_entering(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    context = manager.create_context("c", 4 * MB)
    device.inject_fault(2, Device.Call.create_stream)
    partitions.create_partition("a", "A", share(0.5))
    device.inject_fault(1, Device.Call.create_stream)
    with pytest.raises(DeviceError):
        enter(context)
    assert context.sessions == 0
    enter(context).exit()
    assert sms(device.processors(context.stream)) == 68


@pytest.mark.parametrize("groups", [[1] * 65, [8, 0]])
def test_groups_are_checked(groups: list[int]) -> None:
    with pytest.raises(ValueError, match="processor_groups must be at most 64"):
        native.HostDevice(4 * MB, groups)


# Memory -----------------------------------------------------------------------------------------


def test_the_limit_is_shared_and_mates_give_way(
    manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    outside = manager.create_context("outside", 64 * MB)
    outside.allocate(40 * MB)
    first = manager.create_context("first", 64 * MB, partition="a")
    second = manager.create_context("second", 64 * MB, partition="a")
    first.allocate(40 * MB)
    second.allocate(40 * MB)
    assert manager.usage(outside).evicted == 0, "who is not in the partition cannot help it"
    assert manager.usage(first).evicted > 0
    usage = partitions.get("a").usage
    assert usage.reserved <= 64 * MB
    assert usage.used == 80 * MB
    assert usage.used - usage.evicted <= usage.reserved
    enter(first).exit()
    assert manager.usage(first).evicted == 0
    assert manager.usage(second).evicted > 0
    manager.check_invariants()


def test_free_pages_of_mates_are_taken_first(
    manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    first = manager.create_context("first", 64 * MB, partition="a")
    second = manager.create_context("second", 64 * MB, partition="a")
    first.free(first.allocate(60 * MB))
    second.allocate(60 * MB)
    assert manager.usage(first).resident == 4 * MB
    assert manager.usage(first).evicted == 0


def test_a_context_in_use_is_not_evicted_for_a_mate(
    manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    first = manager.create_context("first", 64 * MB, partition="a")
    second = manager.create_context("second", 64 * MB, partition="a")
    first.allocate(40 * MB)
    session = enter(first)
    assert manager.usage(second).available == 24 * MB
    is_full = (
        r"partition 'a' has 40.00 MiB of 64.00 MiB in use. Reason: its partition is full, and no"
    )
    with pytest.raises(torch.OutOfMemoryError, match=is_full):
        second.allocate(40 * MB)
    session.exit()
    assert manager.usage(second).available == 64 * MB
    second.allocate(40 * MB)


def test_a_base_within_a_partition_is_lent_and_claimed(
    manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    owner = manager.create_context("owner", 48 * MB, 48 * MB, Tier.guaranteed, "a")
    borrower = manager.create_context("borrower", 64 * MB, 0, Tier.best_effort, "a")
    borrower.allocate(60 * MB)
    owner.allocate(48 * MB)
    assert manager.usage(owner).resident == 48 * MB
    assert manager.usage(borrower).resident <= 16 * MB
    manager.check_invariants()


@pytest.mark.parametrize("tier", [Tier.burstable, Tier.guaranteed])
@pytest.mark.parametrize("free", [True, False])
def test_partitions_give_way_to_contexts_in_none(
    manager: Manager, partitions: PartitionManager, tier: Tier, free: bool
) -> None:
    partitions.create_partition("a", "A", PartitionLimits())
    base = 128 * MB if tier == Tier.guaranteed else 0
    claimant = manager.create_context("claimant", 128 * MB, base, tier)
    holder = manager.create_context("holder", 256 * MB, 0, Tier.best_effort, "a")
    address = holder.allocate(240 * MB)
    if free:
        holder.free(address)
    assert manager.usage(claimant).available == 128 * MB
    claimant.allocate(128 * MB)
    assert manager.usage(holder).resident <= 128 * MB
    assert (manager.usage(holder).evicted == 0) is free
    manager.check_invariants()


def test_mates_give_what_only_they_can() -> None:
    def holder(id: int, use: int, spare: int, mate: bool) -> Holder:
        return Holder(id, Tier.burstable, False, False, use, spare, 1, mate)

    holders = [holder(1, 1, 10, False), holder(2, 2, 10, True), holder(3, 3, 10, True)]
    plan = plan_eviction(Tier.burstable, False, 12, holders, 4)
    assert plan == [(1, 8, False), (2, 4, False)]
    assert plan_eviction(Tier.burstable, False, 0, holders, 15) == [(2, 10, False), (3, 5, False)]
    assert plan_eviction(Tier.burstable, False, 0, holders, 21) == []


def test_an_orphan_leaves_its_partition(manager: Manager, partitions: PartitionManager) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    context = manager.create_context("c", 64 * MB, partition="a")
    address = context.allocate(32 * MB)
    manager.destroy_context(context)
    assert partitions.get("a").usage.reserved == 0
    partitions.delete_partition("a")
    manager.check_invariants()
    context.free(address)
    assert manager.device_usage().contexts == []


# Assigning --------------------------------------------------------------------------------------


def test_assigning_moves_memory_and_stream(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB).compute(0.5))
    partitions.create_partition("b", "B", PartitionLimits().memory(32 * MB).compute(0.25))
    context = manager.create_context("c", 32 * MB)
    address = context.allocate(16 * MB)
    for id, count in (("a", 64), ("b", 32), ("a", 64)):
        partitions.assign(context, id)
        assert sms(device.processors(context.stream)) == count
        assert partitions.get(id).usage.reserved == 16 * MB
        assert partitions.get(id).contexts == ["c"]
        manager.check_invariants()
    assert partitions.get("b").contexts == []
    partitions.assign(context, None)
    assert manager.usage(context).partition == ""
    context.free(address)


def test_what_does_not_fit_is_not_assigned(manager: Manager, partitions: PartitionManager) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    holder = manager.create_context("holder", 48 * MB, 48 * MB, Tier.guaranteed, "a")
    large = manager.create_context("large", 128 * MB)
    with pytest.raises(ValueError, match=r"max 128.00 MiB is above the 64.00 MiB"):
        partitions.assign(large, "a")
    other = manager.create_context("other", 32 * MB, 32 * MB, Tier.guaranteed)
    with pytest.raises(AdmissionError, match=r"'other' cannot be assigned to partition 'a'.*16.00"):
        partitions.assign(other, "a")
    user = manager.create_context("user", 16 * MB)
    session = enter(user)
    with pytest.raises(ContextBusyError, match="'user' cannot be assigned while it has open"):
        partitions.assign(user, "a")
    session.exit()
    assert partitions.get("a").contexts == ["holder"]
    # Free pages are no obstacle.
    user.free(user.allocate(16 * MB))
    holder.free(holder.allocate(48 * MB))
    partitions.assign(user, "a")
    manager.check_invariants()


def test_assigning_waits_for_nobody_outside_of_the_partition(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", PartitionLimits())
    context = manager.create_context("c", 128 * MB)
    context.allocate(80 * MB)
    other = manager.create_context("other", 256 * MB)
    address = other.allocate(160 * MB)
    device.hold(other.stream)
    device.record(other.stream)
    other.free(address)
    thread = threading.Thread(target=partitions.assign, args=(context, "a"), daemon=True)
    thread.start()
    try:
        thread.join(30)
        assert not thread.is_alive()
    finally:
        device.let_go(other.stream)
        thread.join(30)
    assert manager.usage(other).resident == 160 * MB, "it keeps its free pages"


def test_errors_say_nothing_of_earlier_failures(
    device: native.HostDevice, manager: Manager, partitions: PartitionManager
) -> None:
    context = manager.create_context("c", 8 * MB)
    large = manager.create_context("large", 64 * MB)
    partitions.create_partition("a", "A", PartitionLimits().memory(4 * MB))
    for refused in (
        lambda: partitions.create_partition("b", "B", share(0.01)),
        lambda: partitions.assign(large, "a"),
    ):
        device.inject_fault(1, Device.Call.map)
        with pytest.raises(torch.OutOfMemoryError, match="map"):
            context.allocate(MB)
        with pytest.raises((ValueError, AdmissionError)) as raised:
            refused()
        assert "the device said" not in str(raised.value)


# Ids and lives ----------------------------------------------------------------------------------


def test_a_partition_in_use_cannot_be_deleted(
    manager: Manager, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", PartitionLimits())
    context = manager.create_context("c", 4 * MB, partition="a")
    with pytest.raises(ContextBusyError, match=r"'a' is in use.*'c'"):
        partitions.delete_partition("a")
    assert partitions.partition_ids == ["a"]
    manager.destroy_context(context)
    partitions.delete_partition("a")
    assert partitions.partition_ids == []


def test_partitions_go_with_their_manager_unless_they_are_in_use(manager: Manager) -> None:
    first = PartitionManager(PartitionConfig(64 * MB), manager)
    first.create_partition("unused", "U", share(0.5))
    first.create_partition("used", "U", share(0.5))
    context = manager.create_context("c", 4 * MB, partition="used")
    del first
    gc.collect()
    second = PartitionManager(PartitionConfig(64 * MB), manager)
    second.create_partition("unused", "U", share(0.5))
    with pytest.raises(ValueError, match="'used' exists already"):
        second.create_partition("used", "U", share(0.5))
    manager.destroy_context(context)
    second.create_partition("used", "U", share(0.5))


def test_managers_divide_one_device(manager: Manager) -> None:
    first = PartitionManager(PartitionConfig(64 * MB), manager)
    second = PartitionManager(PartitionConfig(64 * MB), manager)
    first.create_partition("a", "A", share(0.75).memory(64 * MB))
    with pytest.raises(AdmissionError, match=r"0.5 of the processors does not fit.*0.75"):
        second.create_partition("b", "B", share(0.5))
    second.create_partition("b", "B", share(0.25).memory(64 * MB))
    assert second.partition_ids == ["b"]
    with pytest.raises(ValueError, match=r"unknown partition 'a'; there are: 'b'"):
        second.get("a")


def test_overcommit(manager: Manager) -> None:
    config = PartitionConfig(64 * MB, allow_overcommit=True, overcommit_ratio=1.5)
    partitions = PartitionManager(config, manager)
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    partitions.create_partition("b", "B", PartitionLimits().memory(32 * MB))
    assert partitions.stats().available_memory == 0
    with pytest.raises(AdmissionError, match=r"2.00 MiB does not fit: .* 96.00 MiB of 96.00 MiB"):
        partitions.create_partition("c", "C", PartitionLimits().memory(2 * MB))


@pytest.mark.parametrize("ratio", [1e12, 1e300])
def test_sums_of_limits_do_not_overflow(manager: Manager, ratio: float) -> None:
    partitions = PartitionManager(PartitionConfig(256 * MB, True, ratio), manager)
    assert partitions.stats().available_memory == 2**63
    partitions.create_partition("a", "A", PartitionLimits().memory(2 * MB))
    for memory in (2**64 - 1, 2**64 - 2 * MB, 2**63):
        with pytest.raises(AdmissionError, match=r"does not fit: partitions have 2.00 MiB"):
            partitions.create_partition("b", "B", PartitionLimits().memory(memory))
    partitions.create_partition("b", "B", PartitionLimits().memory(2**63 - 2 * MB))
    assert partitions.stats().available_memory == 0
    context = manager.create_context("c", 64 * MB, partition="b")
    context.free(context.allocate(64 * MB))
    manager.check_invariants()


def test_a_partition_may_go_while_it_is_looked_at(partitions: PartitionManager) -> None:
    done = threading.Event()
    seen: list[BaseException] = []

    def look() -> None:
        while not done.is_set():
            try:
                assert partitions.get("a").sm_count in (64, None)
            except ValueError as error:
                if "unknown partition" not in str(error):
                    seen.append(error)
            except BaseException as error:
                seen.append(error)

    threads = [threading.Thread(target=look, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2000):
            partitions.create_partition("a", "A", share(0.5))
            partitions.delete_partition("a")
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert seen == []


def test_nothing_less_than_nothing_is_left(partitions: PartitionManager) -> None:
    """Sums of shares may exceed 1 by what decimal fractions lose."""
    for id, rest in (("a", 0.5), ("b", 0.5000005)):
        partitions.create_partition(id, id, share(rest).bandwidth(rest))
    assert partitions.stats().available_bandwidth == 0
    assert partitions.stats().available_compute == 0


def test_limits_are_copied() -> None:
    limits = PartitionLimits()
    filled = limits.memory(5).compute(0.5).bandwidth(1.0).streams(3)
    assert (limits.memory_limit, limits.stream_limit) == (None, None)
    assert filled.memory_limit == 5
    assert filled.compute_limit == 0.5
    assert filled.bandwidth_limit == 1.0
    assert filled.stream_limit == 3


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        (lambda p: PartitionLimits().compute(1.01), ValueError, "compute must be a share"),
        (lambda p: PartitionLimits().compute(0), ValueError, "compute must be a share"),
        (lambda p: PartitionLimits().compute(float("nan")), ValueError, "compute must be a share"),
        (lambda p: PartitionLimits().bandwidth(-0.5), ValueError, "bandwidth must be a share"),
        (
            lambda p: PartitionLimits().compute("half"),
            TypeError,
            "compute must be an int or a float",
        ),
        (lambda p: PartitionLimits().memory(-1), ValueError, "memory must be positive"),
        (lambda p: PartitionLimits().memory(1.5), TypeError, "memory must be an int"),
        (lambda p: PartitionLimits().streams(0), ValueError, "streams must be from 1 to"),
        (lambda p: PartitionConfig(True), TypeError, "total_memory must be an int"),
        (lambda p: p.create_partition("", "", PartitionLimits()), ValueError, "needs an id"),
        (
            lambda p: p.create_partition("x", "", PartitionLimits().memory(MB)),
            ValueError,
            "less than one page",
        ),
        (
            lambda p: p.create_partition("x", "", PartitionLimits().memory(512 * MB)),
            AdmissionError,
            "does not fit",
        ),
        (lambda p: p.create_partition("x", "", share(0.05)), AdmissionError, "smallest free group"),
        (lambda p: p.create_partition("x", "", share(0.9)), AdmissionError, "does not fit"),
        (
            lambda p: p.create_partition("x", "", PartitionLimits().bandwidth(0.7)),
            AdmissionError,
            "bandwidth",
        ),
        (lambda p: p.create_partition("there", "", PartitionLimits()), ValueError, "exists"),
        (lambda p: p.get("x"), ValueError, "unknown partition 'x'; there are: 'there'"),
        (lambda p: p.delete_partition("x"), ValueError, "unknown partition"),
        (lambda p: p.assign("context", "there"), TypeError, "expected a context"),
    ],
)
def test_wrong_input_gives_one_clear_error(
    manager: Manager,
    partitions: PartitionManager,
    wrong: object,
    kind: type[Exception],
    text: str,
) -> None:
    partitions.create_partition("there", "T", share(0.5).bandwidth(0.5).memory(4 * MB))
    before = partitions.stats()
    with pytest.raises(kind, match=text) as raised:
        wrong(partitions)  # type: ignore[operator]
    assert str(raised.value).count("\n") == 0
    assert partitions.partition_ids == ["there"]
    after = partitions.stats()
    assert after.available_compute == before.available_compute
    assert after.available_memory == before.available_memory
    manager.check_invariants()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (PartitionConfig(512 * MB), "exceeds|not between"),
        (PartitionConfig(0), "not between"),
        (PartitionConfig(MB, True, 0.5), "overcommit_ratio must be 1 or more"),
        (PartitionConfig(MB, True, float("inf")), "overcommit_ratio"),
    ],
)
def test_a_configuration_is_checked(manager: Manager, config: PartitionConfig, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PartitionManager(config, manager)


# The public functions ---------------------------------------------------------------------------


@pytest.fixture
def initialized() -> Iterator[None]:
    pgk.shutdown()
    pgk.initialize(device="cpu", total_vram=256 * MB)
    yield
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()


@pytest.mark.usefixtures("initialized")
def test_contexts_belong_to_partitions() -> None:
    partitions = PartitionManager(PartitionConfig(256 * MB))
    with pytest.warns(UserWarning, match="'a' limits no computation: host"):
        info = partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB).compute(0.5))
    assert (info.sm_count, info.memory_limit, info.compute_limit) == (None, 64 * MB, 0.5)
    context = create_context("c", 32 * MB, partition="a")
    other = create_context("d", 32 * MB)
    assert (context.partition, other.partition) == ("a", None)
    assert partitions.get_partition("a").contexts == ["c"]
    assert [each.partition for each in pgk.stats().contexts] == ["a", None]
    partitions.assign(other, "a")
    assert other.partition == "a"
    with context_session(context):
        kept = torch.ones(MB)
    assert partitions.get("a").usage.used == 4 * MB
    del kept


@pytest.mark.usefixtures("initialized")
def test_wrong_partitions_of_contexts() -> None:
    partitions = PartitionManager(PartitionConfig(256 * MB))
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    with pytest.raises(ValueError, match="unknown partition 'b'; there are: 'a'"):
        create_context("c", 4 * MB, partition="b")
    with pytest.raises(ValueError, match=r"'c' in partition 'a': max 128.00 MiB is above the 64"):
        create_context("c", 128 * MB, partition="a")
    with pytest.raises(TypeError, match="partition must be a str"):
        create_context("c", 4 * MB, partition=1)  # type: ignore[arg-type]
    create_context("g", 48 * MB, qos=QoSPolicy.GUARANTEED, partition="a")
    with pytest.raises(AdmissionError, match=r"'c' in partition 'a'.*16.00 MiB of the partition"):
        create_context("c", 32 * MB, qos=QoSPolicy.GUARANTEED, partition="a")
    assert [context.name for context in pgk.list_contexts()] == ["g"]


def test_after_shutdown_a_partition_manager_is_of_no_use() -> None:
    pgk.shutdown()
    pgk.initialize(device="cpu", total_vram=256 * MB)
    partitions = PartitionManager(PartitionConfig(256 * MB))
    partitions.create_partition("a", "A", PartitionLimits().memory(64 * MB))
    pgk.shutdown()
    with pytest.raises(ValueError, match="was shut down"):
        partitions.get("a")
    pgk.initialize(device="cpu", total_vram=256 * MB)
    with pytest.raises(ValueError, match="unknown partition 'a'; there are: none"):
        create_context("c", 4 * MB, partition="a")
    pgk.shutdown()


@pytest.mark.usefixtures("initialized")
def test_a_context_besides_partitions_that_have_everything_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = pgk.scheduler._runtime.get_or_initialize()
    manager = Manager(native.HostDevice(256 * MB, GROUPS), native.host_streams())
    monkeypatch.setattr(runtime, "manager", manager)
    partitions = PartitionManager(PartitionConfig(256 * MB), manager)
    partitions.create_partition("a", "A", share(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_context("c", 4 * MB).destroy()
    partitions.create_partition("b", "B", share(0.5))
    with pytest.warns(UserWarning, match="partitions have all SMs: context 'd'"):
        create_context("d", 4 * MB).destroy()


@pytest.mark.usefixtures("initialized")
def test_streams_limit_the_sessions_of_a_partition() -> None:
    """Let in by tier, whichever context they enter."""
    partitions = PartitionManager(PartitionConfig(256 * MB))
    partitions.create_partition("a", "A", PartitionLimits().streams(1))
    low = create_context("low", 4 * MB, qos=QoSPolicy.BEST_EFFORT, partition="a")
    high = create_context("high", 4 * MB, qos=QoSPolicy.GUARANTEED)
    partitions.assign(high, "a")
    order: list[str] = []

    def work(context: pgk.ExecutionContext) -> None:
        with context_session(context):
            order.append(context.name)

    # Made outside of the session: those started in it would be in it.
    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in (low, high)]
    session = context_session(low)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with session:
            entered.set()
            leave.wait(30)

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    try:
        assert entered.wait(30)
        for i, thread in enumerate(threads):
            thread.start()
            deadline = time.monotonic() + 30
            while partitions.get("a").usage.waiting <= i and time.monotonic() < deadline:
                time.sleep(0.001)
        usage = partitions.get("a").usage
        assert (usage.sessions, usage.waiting) == (1, 2)
    finally:
        leave.set()
        for thread in (holder, *threads):
            thread.join(30)
            assert not thread.is_alive()
    assert order == ["high", "low"]
    # Out of the partition, nobody waits.
    partitions.assign(high, None)
    with context_session(low), context_session(high):
        assert partitions.get("a").usage.sessions == 1
