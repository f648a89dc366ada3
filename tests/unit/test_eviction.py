"""Who gives way to whom, and what becomes of those who do: on a host device, without torch."""

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygpukit_torch import ContextBusyError, DeviceError, native
from pygpukit_torch.native import Device, Holder, Tier, plan_eviction

MB = 1 << 20
PAGE = 2 * MB
LOW, MIDDLE, HIGH = Tier.best_effort, Tier.burstable, Tier.guaranteed


# The plan ----------------------------------------------------------------------------------------


def holder(
    id: int,
    tier: Tier = MIDDLE,
    spare: int = 10,
    *,
    use: int = 0,
    active: bool = False,
    orphan: bool = False,
) -> Holder:
    return Holder(id, tier, orphan, active, use, spare, 1)


def order(claim: Tier, holders: list[Holder], *, of_base: bool = False, all_: int) -> list[int]:
    return [id for id, _, _ in plan_eviction(claim, of_base, all_, holders)]


def test_orphans_then_the_lowest_tier_then_the_least_recently_used() -> None:
    holders = [
        holder(1, MIDDLE, use=1),
        holder(2, LOW, use=9),
        holder(3, LOW, use=5),
        holder(4, HIGH, use=20, orphan=True),
        holder(5, MIDDLE, use=0),
    ]
    assert order(MIDDLE, holders, all_=50) == [4, 3, 2, 5, 1]


def test_only_as_much_as_is_needed_in_whole_pages() -> None:
    holders = [Holder(1, LOW, False, False, 1, 30, 4), Holder(2, LOW, False, False, 2, 30, 4)]
    assert plan_eviction(MIDDLE, False, 5, holders) == [(1, 8, False)]
    assert plan_eviction(MIDDLE, False, 33, holders) == [(1, 30, False), (2, 4, False)]


def test_a_higher_tier_never_gives_way() -> None:
    assert plan_eviction(LOW, True, 5, [holder(1, MIDDLE), holder(2, HIGH)]) == []
    assert order(MIDDLE, [holder(1, HIGH), holder(2, LOW)], all_=10) == [2]


def test_active_contexts_yield_to_a_base_of_a_higher_tier_only() -> None:
    holders = [holder(1, LOW, active=True), holder(2, MIDDLE, active=True), holder(3, MIDDLE)]
    assert plan_eviction(MIDDLE, False, 15, holders) == []
    assert plan_eviction(MIDDLE, True, 15, holders) == [(3, 10, False), (1, 5, True)]
    assert plan_eviction(HIGH, True, 30, holders) == [(3, 10, False), (1, 10, True), (2, 10, True)]


def test_nobody_is_evicted_where_it_would_not_suffice() -> None:
    assert plan_eviction(HIGH, True, 11, [holder(1)]) == []


@given(
    claim=st.sampled_from([LOW, MIDDLE, HIGH]),
    of_base=st.booleans(),
    bytes_=st.integers(1, 120),
    raw=st.lists(
        st.tuples(
            st.sampled_from([LOW, MIDDLE, HIGH]),
            st.booleans(),
            st.booleans(),
            st.integers(0, 5),
            st.integers(0, 10),
            st.sampled_from([1, 2, 4]),
        ),
        max_size=8,
    ),
)
def test_every_plan_keeps_the_rules(
    claim: Tier,
    of_base: bool,
    bytes_: int,
    raw: list[tuple[Tier, bool, bool, int, int, int]],
) -> None:
    known = {}
    holders = []
    for id, (tier, orphan, active, use, pages, page) in enumerate(raw):
        known[id] = (tier, orphan, active, use, pages * page, page)
        holders.append(Holder(id, tier, orphan, active, use, pages * page, page))

    def allowed(tier: Tier, orphan: bool, active: bool) -> bool:
        if active:
            return of_base and tier.value < claim.value
        return orphan or tier.value <= claim.value

    reach = sum(entry[4] for entry in known.values() if allowed(*entry[:3]))
    plan = plan_eviction(claim, of_base, bytes_, holders)
    assert bool(plan) == (reach >= bytes_)
    taken = sum(bytes for _, bytes, _ in plan)
    assert not plan or taken >= bytes_
    ranks = []
    for id, bytes, active in plan:
        tier, orphan, is_active, use, spare, page = known[id]
        assert allowed(tier, orphan, is_active)
        assert active == is_active
        assert 0 < bytes <= spare
        assert bytes % page == 0
        ranks.append((active, not orphan, tier.value, use))
    assert ranks == sorted(ranks)
    # Without the last page it would be too little.
    assert not plan or taken - known[plan[-1][0]][5] < bytes_


# The manager -------------------------------------------------------------------------------------


class Bench:
    def __init__(
        self, capacity: int = 64 * MB, backup: int = 256 * MB, claim_timeout: float = 0.1
    ) -> None:
        self.device = native.HostDevice(capacity)
        self.manager = native.Manager(self.device, host_backup=backup, claim_timeout=claim_timeout)
        self.blocks: dict[int, tuple[native.Context, int, int]] = {}

    def create(self, name: str, budget: int, base: int = 0, tier: Tier = MIDDLE) -> native.Context:
        return self.manager.create_context(name, budget, base, tier)

    def fill(self, context: native.Context, size: int, mark: int) -> int:
        """A block all of whose bytes are ``mark``."""
        address = context.allocate(size)
        ctypes.memset(address, mark, size)
        self.blocks[address] = (context, size, mark)
        return address

    def free(self, address: int) -> None:
        self.blocks.pop(address)[0].free(address)

    def check(self) -> None:
        self.manager.check_invariants()
        for address, (_, size, mark) in self.blocks.items():
            memory = (ctypes.c_uint8 * size).from_address(address)
            assert torch.frombuffer(memory, dtype=torch.uint8).eq(mark).all()

    def evicted(self, context: native.Context) -> int:
        return self.manager.usage(context).evicted

    def resident(self, context: native.Context) -> int:
        return self.manager.usage(context).resident


class Entered:
    def __init__(self, context: native.Context) -> None:
        self.session = native.Session(context, ordered=False)

    def __enter__(self) -> None:
        self.session.enter()

    def __exit__(self, *_: object) -> None:
        self.session.exit()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_idle_context_makes_room_and_keeps_its_contents(bench: Bench) -> None:
    a, b = bench.create("a", 48 * MB), bench.create("b", 48 * MB)
    bench.fill(a, 40 * MB, 1)
    bench.fill(b, 40 * MB, 2)
    assert bench.evicted(a) == 16 * MB
    assert bench.resident(a) == 24 * MB
    bench.check()
    with Entered(a):
        assert bench.evicted(a) == 0
        bench.check()
    assert bench.evicted(b) == 16 * MB
    bench.check()


def test_evicted_memory_can_be_written_and_freed(bench: Bench) -> None:
    a = bench.create("a", 40 * MB)
    first, second = bench.fill(a, 16 * MB, 1), bench.fill(a, 16 * MB, 2)
    bench.manager.evict_context(a)
    assert bench.evicted(a) == 32 * MB
    assert bench.resident(a) == 0
    ctypes.memset(first, 9, 16 * MB)
    bench.blocks[first] = (a, 16 * MB, 9)
    bench.free(second)
    bench.check()
    bench.manager.restore_context(a)
    bench.check()
    assert bench.evicted(a) == 0


def test_the_least_recently_used_goes_first_and_a_session_counts_as_use(bench: Bench) -> None:
    a, b, c = (bench.create(name, 24 * MB) for name in "abc")
    for mark, context in enumerate((a, b, c), start=1):
        bench.fill(context, 20 * MB, mark)
    with Entered(a):
        pass
    bench.fill(bench.create("d", 24 * MB), 20 * MB, 4)
    assert (bench.evicted(a), bench.evicted(b), bench.evicted(c)) == (0, 16 * MB, 0)
    bench.check()


def test_contexts_in_use_are_left_alone(bench: Bench) -> None:
    a, b = bench.create("a", 64 * MB), bench.create("b", 64 * MB)
    bench.fill(a, 40 * MB, 1)
    with Entered(a):
        with pytest.raises(torch.OutOfMemoryError, match=r"nobody can give way.*a 40.* in use"):
            b.allocate(40 * MB)
        with pytest.raises(ContextBusyError, match="'a' cannot be evicted: it is in use"):
            bench.manager.evict_context(a)
    assert bench.evicted(a) == 0
    bench.fill(b, 40 * MB, 2)
    assert bench.evicted(a) == 16 * MB
    bench.check()


def test_bases_are_never_evicted_for_others(bench: Bench) -> None:
    reserved = bench.create("reserved", 32 * MB, 32 * MB, HIGH)
    half = bench.create("half", 24 * MB, 16 * MB)
    bench.fill(reserved, 32 * MB, 1)
    bench.fill(half, 24 * MB, 2)
    other = bench.create("other", 64 * MB)
    bench.fill(other, 16 * MB, 3)
    assert (bench.evicted(reserved), bench.evicted(half)) == (0, 8 * MB)
    with pytest.raises(torch.OutOfMemoryError):
        other.allocate(2 * MB)
    bench.check()


def test_a_lower_tier_never_evicts_a_higher_one(bench: Bench) -> None:
    bench.fill(bench.create("high", 64 * MB), 60 * MB, 1)
    low = bench.create("low", 64 * MB, 0, LOW)
    with pytest.raises(torch.OutOfMemoryError, match="nobody can give way"):
        low.allocate(8 * MB)
    bench.check()


def test_best_effort_takes_turns_with_best_effort(bench: Bench) -> None:
    a, b = bench.create("a", 64 * MB, 0, LOW), bench.create("b", 64 * MB, 0, LOW)
    bench.fill(a, 60 * MB, 1)
    bench.fill(b, 60 * MB, 2)
    for _ in range(3):
        for context in (a, b):
            with Entered(context):
                assert bench.evicted(context) == 0
                bench.check()


def test_an_unused_base_is_lent_and_claimed_back(bench: Bench) -> None:
    reserved = bench.create("reserved", 40 * MB, 40 * MB, HIGH)
    low = bench.create("low", 64 * MB, 0, LOW)
    bench.fill(low, 60 * MB, 1)
    assert bench.resident(low) == 60 * MB
    bench.check()
    bench.fill(reserved, 40 * MB, 2)
    assert (bench.resident(reserved), bench.resident(low)) == (40 * MB, 24 * MB)
    bench.check()
    bench.manager.evict_context(reserved)
    assert bench.manager.device_usage().pooled == 40 * MB, "an evicted base is still reserved"
    with Entered(low):
        assert bench.resident(low) == 60 * MB
    with Entered(reserved):
        assert bench.evicted(reserved) == 0
        bench.check()


def test_a_claim_waits_for_whoever_has_lent_the_base_and_names_him(bench: Bench) -> None:
    reserved = bench.create("reserved", 40 * MB, 40 * MB, HIGH)
    low = bench.create("low", 64 * MB, 0, LOW)
    bench.fill(low, 60 * MB, 1)
    with Entered(low):
        with pytest.raises(
            torch.OutOfMemoryError, match="context 'low' is in use and did not yield within 100 ms"
        ):
            reserved.allocate(40 * MB)
        bench.check()
    entered, leave = threading.Event(), threading.Event()

    def use() -> None:
        with Entered(low):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=use)
    thread.start()
    entered.wait()
    threading.Timer(0.02, leave.set).start()
    bench.fill(reserved, 40 * MB, 2)
    thread.join()
    bench.check()


def test_without_host_memory_nothing_is_evicted_and_nothing_lent() -> None:
    bench = Bench(backup=0)
    bench.create("reserved", 40 * MB, 40 * MB, HIGH)
    a, b = bench.create("a", 64 * MB, 0, LOW), bench.create("b", 64 * MB, 0, LOW)
    bench.fill(a, 24 * MB, 1)
    for context in (a, b):
        with pytest.raises(torch.OutOfMemoryError):
            context.allocate(2 * MB)
    with pytest.raises(torch.OutOfMemoryError, match=r"'a' cannot be evicted.*host_backup.* 0 B"):
        bench.manager.evict_context(a)
    bench.check()


def test_a_full_host_memory_is_told() -> None:
    bench = Bench(backup=16 * MB)
    a, b = bench.create("a", 64 * MB), bench.create("b", 64 * MB)
    bench.fill(a, 60 * MB, 1)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"host_backup\) is full: 0 B of 16\.00 MiB are in use"
    ):
        b.allocate(40 * MB)
    bench.fill(b, 16 * MB, 2)
    bench.check()


def test_host_memory_goes_back_with_the_contexts(bench: Bench) -> None:
    a = bench.create("a", 40 * MB)
    block = bench.fill(a, 40 * MB, 1)
    bench.manager.evict_context(a)
    assert bench.device.backup_bytes == 40 * MB
    bench.free(block)
    bench.manager.destroy_context(a)
    assert bench.device.backup_bytes == 0
    assert bench.manager.device_usage().host_existing == 0


def test_the_memory_of_destroyed_contexts_goes_first(bench: Bench) -> None:
    gone, idle = bench.create("gone", 32 * MB, 32 * MB, HIGH), bench.create("idle", 32 * MB)
    bench.fill(gone, 30 * MB, 1)
    bench.fill(idle, 30 * MB, 2)
    bench.manager.destroy_context(gone)
    bench.fill(bench.create("next", 32 * MB, 0, LOW), 20 * MB, 3)
    usage = {usage.name: usage.evicted for usage in bench.manager.device_usage().contexts}
    assert usage == {"gone": 16 * MB, "idle": 0, "next": 0}
    bench.check()
    for address, (context, _, _) in list(bench.blocks.items()):
        if context is gone:
            bench.free(address)
    bench.check()


def test_unchanged_pages_are_not_copied_out_again(bench: Bench) -> None:
    a = bench.create("a", 40 * MB)
    block = bench.fill(a, 40 * MB, 1)
    bench.manager.evict_context(a)
    bench.manager.restore_context(a)
    assert a.counters.bytes_out == 40 * MB
    ctypes.memset(block + 7 * PAGE + 5, 99, 1)
    bench.manager.evict_context(a)
    assert a.counters.bytes_out == 40 * MB + PAGE, "exactly one page has changed"
    assert a.counters.pages_unchanged == 19
    bench.manager.restore_context(a)
    contents = ctypes.string_at(block, 40 * MB)
    assert contents[7 * PAGE + 5] == 99
    assert contents.count(1) == 40 * MB - 1


def test_what_is_kept_for_unchanged_pages_gives_way_to_what_is_evicted() -> None:
    bench = Bench(backup=40 * MB)
    a, b = bench.create("a", 32 * MB), bench.create("b", 32 * MB)
    bench.fill(a, 32 * MB, 1)
    bench.manager.evict_context(a)
    bench.manager.restore_context(a)
    assert bench.manager.device_usage().host_taken == 32 * MB
    bench.fill(b, 32 * MB, 2)
    bench.manager.evict_context(b)
    assert bench.evicted(b) == 32 * MB
    bench.check()


def test_host_memory_is_there_when_none_is_made_ahead_any_more(bench: Bench) -> None:
    a = bench.create("a", 40 * MB)
    bench.fill(a, 40 * MB, 1)
    bench.manager.stop_making_ahead()
    bench.manager.evict_context(a)
    bench.create("b", 40 * MB)
    assert bench.evicted(a) == 40 * MB
    bench.check()


def test_the_pages_at_an_address_are_the_host_pools_while_evicted(bench: Bench) -> None:
    def file_at(address: int) -> str:
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                return line.rpartition("memfd:")[2].split()[0]
        return "nothing"

    a = bench.create("a", 40 * MB)
    block = bench.fill(a, 40 * MB, 1)
    committed = bench.device.committed_bytes
    assert file_at(block + 20 * MB) == "pygpukit-host-device"
    bench.manager.evict_context(a)
    assert {file_at(block + i * PAGE) for i in range(20)} == {"pygpukit-host-backup"}
    bench.manager.trim()
    assert bench.device.committed_bytes == committed - 40 * MB
    assert bench.device.backup_bytes == 40 * MB
    bench.manager.restore_context(a)
    assert file_at(block) == "pygpukit-host-device"
    bench.check()


def test_a_context_whose_evicted_pages_were_all_freed_is_entered_at_once(bench: Bench) -> None:
    a = bench.create("a", 40 * MB)
    block = bench.fill(a, 40 * MB, 1)
    bench.manager.evict_context(a)
    bench.free(block)
    bench.manager.trim()
    assert bench.evicted(a) == 0
    assert a.is_ready
    with Entered(a):
        bench.fill(a, 8 * MB, 2)
    bench.check()


def test_what_is_free_in_host_memory_need_not_come_back(bench: Bench) -> None:
    a, b = bench.create("a", 48 * MB), bench.create("b", 64 * MB)
    kept, *dropped = (bench.fill(a, 2 * MB, mark) for mark in range(1, 9))
    bench.manager.evict_context(a)
    bench.fill(b, 62 * MB, 9)
    for address in dropped:
        bench.free(address)
    with Entered(b), Entered(a):
        assert bench.evicted(a) == 0
        assert bench.resident(a) == 2 * MB
    bench.check()
    bench.free(kept)


def test_coming_back_is_use(bench: Bench) -> None:
    a, b = bench.create("a", 24 * MB), bench.create("b", 24 * MB)
    for mark, context in enumerate((a, b), start=1):
        bench.fill(context, 20 * MB, mark)
    bench.manager.evict_context(a)
    with Entered(b):
        pass
    bench.manager.restore_context(a)
    bench.fill(bench.create("c", 40 * MB), 40 * MB, 3)
    assert (bench.evicted(a), bench.evicted(b)) == (0, 16 * MB)
    bench.check()


def test_host_memory_for_loans_is_not_given_to_larger_pages() -> None:
    """A victim gives whole pages; what they take beyond the need must not be what is set aside."""
    bench = Bench(capacity=512 * MB, backup=24 * MB)
    reserved = bench.create("reserved", 16 * MB, 16 * MB, HIGH)
    large = bench.create("large", 512 * MB, 0, LOW)
    small = bench.create("small", 64 * MB, 0, LOW)
    assert large.page_bytes == 8 * MB
    bench.fill(large, 512 * MB, 1)
    assert bench.manager.usage(large).resident == 512 * MB
    bench.manager.check_invariants()
    for _ in range(2):
        with contextlib.suppress(torch.OutOfMemoryError):
            small.allocate(2 * MB)
    bench.fill(reserved, 16 * MB, 2)
    bench.check()


def test_two_evictions_at_once_keep_what_is_set_aside() -> None:
    bench = Bench(capacity=96 * MB, backup=72 * MB)
    reserved = bench.create("reserved", 32 * MB, 32 * MB, HIGH)
    contexts = [bench.create(name, 40 * MB, 0, LOW) for name in "abc"]
    for mark, context in enumerate(contexts, start=1):
        bench.fill(context, 32 * MB, mark)

    def evict(context: native.Context) -> None:
        with contextlib.suppress(torch.OutOfMemoryError):
            bench.manager.evict_context(context)

    threads = [threading.Thread(target=evict, args=(context,)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.check()
    bench.fill(reserved, 32 * MB, 9)
    bench.check()


def test_a_restore_without_room_loses_nothing_and_can_be_tried_again(bench: Bench) -> None:
    a, b = bench.create("a", 48 * MB), bench.create("b", 48 * MB)
    bench.fill(a, 40 * MB, 1)
    bench.manager.evict_context(a)
    bench.fill(b, 40 * MB, 2)
    with Entered(b):
        for _ in range(2):
            with pytest.raises(
                torch.OutOfMemoryError,
                match=r"'a' .*cannot come back: 40\.00 MiB .*b 40.* in use",
            ):
                Entered(a).__enter__()
            assert a.sessions == 0
            bench.check()
    with Entered(a):
        bench.check()


@pytest.mark.parametrize("call", ["move", "create_host"])
def test_a_device_that_fails_on_the_way_loses_nothing(bench: Bench, call: str) -> None:
    kind = Device.Call.__members__[call]
    a = bench.create("a", 48 * MB)
    bench.fill(a, 40 * MB, 1)
    bench.device.inject_fault(5, kind)
    with pytest.raises(DeviceError, match=rf"'a' cannot be evicted: host: {call}"):
        bench.manager.evict_context(a)
    bench.check()
    assert bench.evicted(a) in (8 * MB, 0)
    bench.manager.evict_context(a)
    bench.manager.trim()
    if call == "move":
        bench.device.inject_fault(5, kind)
        with pytest.raises(DeviceError, match=rf"'a' cannot be brought back.*host: {call}"):
            bench.manager.restore_context(a)
        bench.check()
    with Entered(a):
        assert bench.evicted(a) == 0
    bench.check()


def test_an_eviction_that_fails_is_told_to_whoever_needed_the_room(bench: Bench) -> None:
    a, b = bench.create("a", 64 * MB), bench.create("b", 64 * MB)
    bench.fill(a, 60 * MB, 1)
    bench.device.inject_fault(2, Device.Call.move)
    with pytest.raises(torch.OutOfMemoryError, match=r"Reason: host: move of 2\.00 MiB failed"):
        b.allocate(40 * MB)
    bench.check()
    bench.fill(b, 40 * MB, 2)
    bench.check()


def test_pinned_contexts_stay(bench: Bench) -> None:
    a, b = bench.create("a", 64 * MB), bench.create("b", 64 * MB)
    bench.fill(a, 40 * MB, 1)
    bench.manager.evict_context(a)
    bench.manager.pin(a)
    assert bench.evicted(a) == 0
    with pytest.raises(ContextBusyError, match="it is pinned"):
        bench.manager.evict_context(a)
    with pytest.raises(torch.OutOfMemoryError):
        b.allocate(40 * MB)
    bench.manager.unpin(a)
    bench.fill(b, 40 * MB, 2)
    bench.check()
    with pytest.raises(ValueError, match="'a' is not pinned"):
        bench.manager.unpin(a)


def test_what_a_consumer_uses_stays_until_it_is_done(bench: Bench) -> None:
    a, b, c = (bench.create(name, 64 * MB) for name in "abc")
    bench.fill(a, 40 * MB, 1)
    with Entered(b):
        bench.manager.declare_consumer(a, b)
        with pytest.raises(torch.OutOfMemoryError):
            c.allocate(40 * MB)
    # Its session is over, but not its work.
    bench.device.hold(b.stream)
    bench.device.record(b.stream)
    done: list[float] = []
    thread = threading.Thread(
        target=lambda: (bench.fill(c, 40 * MB, 2), done.append(time.monotonic()))
    )
    thread.start()
    time.sleep(0.03)
    assert not done
    assert bench.resident(a) == 40 * MB
    bench.device.let_go(b.stream)
    thread.join()
    bench.check()


def test_work_of_the_contexts_own_stream_is_waited_for(bench: Bench) -> None:
    a, b = bench.create("a", 64 * MB), bench.create("b", 64 * MB)
    block = bench.fill(a, 40 * MB, 1)
    source = ctypes.create_string_buffer(b"\7" * 8)
    bench.device.hold(a.stream)
    bench.device.copy(block, ctypes.addressof(source), 8, a.stream)
    threading.Timer(0.02, bench.device.let_go, [a.stream]).start()
    bench.manager.evict_context(a)
    assert ctypes.string_at(block, 8) == b"\7" * 8
    assert b.stream != a.stream


def test_entering_waits_while_pages_move(bench: Bench) -> None:
    """And allocating: nobody is in a context that moves."""
    a, b = bench.create("a", 48 * MB), bench.create("b", 48 * MB)
    bench.fill(a, 40 * MB, 1)
    bench.fill(b, 40 * MB, 2)
    stop = threading.Event()
    errors: list[BaseException] = []

    def turns(context: native.Context, mark: int) -> None:
        try:
            while not stop.is_set():
                with Entered(context):
                    block = context.allocate(MB)
                    ctypes.memset(block, mark, MB)
                    assert bench.manager.usage(context).evicted == 0
                    assert ctypes.string_at(block, MB) == bytes([mark]) * MB
                    context.free(block)
        except torch.OutOfMemoryError:
            pass  # both want the device at once
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=turns, args=(c, m)) for c, m in ((a, 5), (b, 6))]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    bench.check()


# Handlers ----------------------------------------------------------------------------------------


def test_handlers_are_asked_before_others_are_evicted(bench: Bench) -> None:
    asked: list[tuple[str, int, int]] = []
    answer = False

    def handler(context: native.Context, requested: int, available: int) -> bool:
        asked.append((context.name, requested, available))
        return answer

    bench.manager.set_pressure_handler(handler)
    a, b = bench.create("a", 64 * MB), bench.create("b", 64 * MB)
    bench.fill(a, 40 * MB, 1)
    assert asked == []
    with pytest.raises(torch.OutOfMemoryError, match="a memory pressure handler refused"):
        b.allocate(40 * MB)
    assert asked == [("b", 40 * MB, 64 * MB)]
    assert bench.evicted(a) == 0
    answer = True
    bench.fill(b, 40 * MB, 2)
    assert len(asked) == 2
    bench.check()
    # Neither for what is impossible, nor for coming back, nor for a base.
    with pytest.raises(torch.OutOfMemoryError):
        b.allocate(63 * MB)
    with Entered(a):
        pass
    for address in list(bench.blocks):
        bench.free(address)
    reserved = bench.create("reserved", 40 * MB, 40 * MB, HIGH)
    bench.fill(bench.create("low", 64 * MB, 0, LOW), 60 * MB, 4)
    assert len(asked) == 2
    bench.fill(reserved, 40 * MB, 3)
    assert len(asked) == 2
    bench.check()


def test_a_handler_that_goes_may_use_the_manager(bench: Bench) -> None:
    """Whatever Python runs when it is replaced, no lock of the manager is held."""

    class Handler:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __call__(self, context: native.Context, requested: int, available: int) -> bool:
            return True

        def __del__(self) -> None:
            gone.append(bench.manager.device_usage().capacity)

    gone: list[int] = []
    bench.manager.set_pressure_handler(Handler())
    bench.manager.set_pressure_handler(None)
    assert gone == [64 * MB]


def test_a_handler_may_free_memory_and_allocate(bench: Bench) -> None:
    a, b = bench.create("a", 64 * MB), bench.create("b", 64 * MB)
    block = bench.fill(a, 40 * MB, 1)
    calls = 0

    def handler(context: native.Context, requested: int, available: int) -> bool:
        nonlocal calls
        calls += 1
        bench.free(block)
        bench.fill(context, 24 * MB, 5)  # not asked about
        return True

    bench.manager.set_pressure_handler(handler)
    bench.fill(b, 40 * MB, 2)
    assert calls == 1
    assert a.counters.evictions == 0
    bench.check()


LAST_CALL = 54


@pytest.mark.parametrize("n", range(1, LAST_CALL + 1))
def test_any_device_call_may_fail_in_a_program_of_evictions(n: int) -> None:
    bench = Bench(24 * MB)
    contexts = [bench.create("a", 16 * MB, 4 * MB), bench.create("b", 16 * MB, 0, LOW)]
    contexts.append(bench.create("c", 12 * MB, 12 * MB, HIGH))
    bench.device.inject_fault(n)
    failures: list[str] = []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except (torch.OutOfMemoryError, DeviceError) as error:
            failures.append(str(error))
        bench.check()

    for mark, context in enumerate(contexts, start=1):
        attempt(lambda c=context, m=mark: bench.fill(c, 11 * MB, m))  # type: ignore[misc]
    for context in contexts * 2:
        attempt(lambda c=context: bench.manager.restore_context(c))  # type: ignore[misc]
    attempt(lambda: bench.manager.evict_context(contexts[1]))
    attempt(lambda: bench.manager.restore_context(contexts[2]))
    assert bench.device.count(Device.Call.any) >= n, "the fault never struck"
    assert all(re.search("injected fault|no room|nobody", text) for text in failures)
    bench.device.inject_fault(0)
    for address in list(bench.blocks):
        bench.free(address)
    for context in contexts:
        bench.manager.destroy_context(context)
    whole = bench.create("whole", 24 * MB, 24 * MB, HIGH)
    bench.fill(whole, 24 * MB, 9)
    bench.check()
    assert bench.device.backup_bytes == 0
