"""Random programs on a memory pool, beside a model of its quota and of what was used when. Device
calls fail at any time; after every step the books are right and every byte is."""

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pygpukit_torch import DeviceError, native
from pygpukit_torch.native import Device, MemoryBlock

MB = 1 << 20
SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 24).map(lambda n: n * MB // 4 - n % 3))


def class_of(size: int, quota: int) -> int:
    """The smallest of 512 B, 1 KiB, 1.5 KiB, and so on, four to each power of two from 2 KiB.

    The largest is the quota.
    """
    step = 512
    while size > 8 * step:
        step *= 2
    whole = -(-size // step) * step
    largest = quota // 512 * 512
    return largest if size <= largest < whole else whole


@dataclass(eq=False)
class Held:
    """A block that is not freed, or that is but has tensors."""

    block: MemoryBlock
    bytes: int  # of its class
    address: int
    mark: int
    use: int
    evicted: bool = False
    tensors: list[torch.Tensor] = field(default_factory=list)

    def write(self) -> None:
        for offset in (0, self.block.size - 1):
            ctypes.memset(self.address + offset, self.mark, 1)

    def check(self) -> None:
        for offset in (0, self.block.size - 1):
            assert ctypes.string_at(self.address + offset, 1) == bytes([self.mark])


class MemoryPoolMachine(RuleBasedStateMachine):
    """Drives a pool and the model.

    A fault may cost more cached blocks than a request needs, and which ones cannot be seen: the
    model then knows no more of them until none are left. Who must go, in which order, and whether a
    request fits, it always knows.
    """

    @initialize(quota=st.sampled_from([5000, 3 * MB, 8 * MB]), evicts=st.booleans())
    def start(self, quota: int, evicts: bool) -> None:
        self.quota, self.evicts = quota, evicts
        # So large that fragmentation never exhausts it: then only faults make calls fail.
        self.device = native.HostDevice(32 * MB)
        self.pool = native.MemoryPool(quota, evicts, self.device)
        self.held: list[Held] = []
        self.leaving: list[Held] = []
        self.cached: Counter[int] | None = Counter()
        self.uses = 0
        self.allocations = 0
        self.reuses = 0
        self.evictions = 0
        self.fault_at = 0

    # The model ------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        return sum(h.bytes for h in self.held if not h.evicted) + sum(h.bytes for h in self.leaving)

    def next_use(self) -> int:
        self.uses += 1
        return self.uses

    def cache(self, size: int) -> None:
        if self.cached is not None:
            self.cached[size] += 1

    def victims(self, size: int) -> list[Held] | None:
        """Who must go for a block of a class that is not cached; None if that does not suffice."""
        chosen = []
        missing = self.used + size - self.quota
        candidates = [h for h in self.held if not h.evicted and not h.tensors]
        for candidate in sorted(candidates, key=lambda h: h.use) if self.evicts else []:
            if missing <= 0:
                break
            chosen.append(candidate)
            missing -= candidate.bytes
        return chosen if missing <= 0 else None

    def make_room(self, size: int) -> None:
        """What the cached blocks are once a block of this class has been served."""
        assert self.cached is not None
        if self.cached[size]:
            self.cached[size] -= 1
            self.reuses += 1
            return
        while self.used + self.cached_bytes + size > self.quota:
            self.cached[max(c for c, n in self.cached.items() if n)] -= 1

    @property
    def cached_bytes(self) -> int:
        assert self.cached is not None
        return sum(size * count for size, count in self.cached.items())

    def attempt(self, operation: Callable[[], Any]) -> tuple[Any, Exception | None, bool]:
        """What it returned, what it raised, and whether the fault struck in it."""
        before = self.device.count(Device.Call.any)
        result, error = None, None
        try:
            result = operation()
        except (MemoryError, DeviceError) as raised:
            error = raised
        struck = before < self.fault_at <= self.device.count(Device.Call.any)
        assert struck or not isinstance(error, DeviceError)
        return result, error, struck

    def obtain(self, size: int, operation: Callable[[], Any]) -> Any:
        """Run what needs memory of a class; None if it failed. Follows what it did to others."""
        known = self.cached is not None
        hit = bool(self.cached and self.cached[size])
        victims = self.victims(size)
        before = self.figures()
        result, error, struck = self.attempt(operation)
        if isinstance(error, MemoryError):
            assert victims is None, "refused, although it would have fitted"
            assert self.figures() == before, "refused, but something changed"
            return None
        gone = [h for h in self.held if not h.evicted and h.block.is_evicted]
        gone.sort(key=lambda h: h.use)
        if victims is None:
            assert hit or not known or error is not None, "more was handed out than fits"
            assert not gone
        elif hit:
            assert not gone, "evicted without need"
        elif error is None and known:
            assert gone == victims, "not the least recently used"
        else:
            assert gone == victims[: len(gone)], "not the least recently used"
        for victim in gone:
            victim.evicted = True
            self.evictions += 1
            self.cache(victim.bytes)
        if struck:
            self.cached = None
        elif self.cached is not None:
            self.make_room(size)
        return result if error is None else None

    def figures(self) -> dict[str, int]:
        stats = self.pool.stats()
        return {name: getattr(stats, name) for name in dir(stats) if not name.startswith("_")}

    def some(self, data: st.DataObject, **flags: bool) -> Held | None:
        chosen = [h for h in self.held if all(getattr(h, k) == v for k, v in flags.items())]
        return data.draw(st.sampled_from(chosen), label="block") if chosen else None

    # The steps ------------------------------------------------------------------------------------

    @rule(size=SIZES)
    def allocate(self, size: int) -> None:
        occupied = class_of(size, self.quota)
        block = self.obtain(occupied, lambda: self.pool.allocate(size))
        if block is not None:
            self.allocations += 1
            held = Held(block, occupied, block.ptr, self.allocations % 255 + 1, self.next_use())
            held.write()
            self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        held = self.some(data)
        assert held
        self.pool.free(held.block)
        self.release(held)

    def release(self, held: Held) -> None:
        self.held.remove(held)
        if held.tensors:
            self.leaving.append(held)
        elif not held.evicted:
            self.cache(held.bytes)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        held = self.some(data)
        assert held
        self.pool.touch(held.block)
        held.use = self.next_use()

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        held = self.some(data, evicted=False)
        if held is None:
            return
        if held.tensors:
            try:
                self.pool.evict(held.block)
            except ValueError:
                return
            raise AssertionError("a block with a tensor was evicted")
        _, error, _ = self.attempt(lambda: self.pool.evict(held.block))
        assert held.block.is_evicted == (error is None)
        if error is None:
            held.evicted = True
            self.evictions += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tensor=st.booleans())
    def restore(self, data: st.DataObject, tensor: bool) -> None:
        held = self.some(data, evicted=True) or self.some(data)
        assert held

        def bring_back() -> Any:
            if tensor:
                return held.block.as_tensor()
            self.pool.restore(held.block)
            return True

        result = self.obtain(held.bytes, bring_back) if held.evicted else bring_back()
        if result is None:
            assert held.block.is_evicted
            return
        held.use = self.next_use()
        held.evicted = False
        held.address = held.block.ptr
        if tensor:
            assert result.data_ptr() == held.address
            held.tensors.append(result)

    @rule(data=st.data())
    def forget_a_tensor(self, data: st.DataObject) -> None:
        holders = [held for held in self.held + self.leaving if held.tensors]
        if not holders:
            return
        held = data.draw(st.sampled_from(holders), label="block")
        held.tensors.pop()
        if held in self.leaving and not held.tensors:
            self.leaving.remove(held)
            self.cache(held.bytes)

    @precondition(lambda self: self.uses % 5 == 4)
    @rule()
    def clear(self) -> None:
        _, error, _ = self.attempt(self.pool.clear)
        for held in list(self.held):
            self.release(held)
        self.cached = None if error else Counter()
        self.reuses = self.pool.stats().reuse_count

    @rule(calls=st.integers(1, 12))
    def fault(self, calls: int) -> None:
        self.device.inject_fault(calls)
        self.fault_at = self.device.count(Device.Call.any) + calls

    @invariant()
    def books_and_bytes_are_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        for held in self.held:
            assert held.block.is_evicted == held.evicted
            assert held.block.ptr == (0 if held.evicted else held.address)
            if not held.evicted:
                held.check()
        for held in self.leaving:
            held.check()
        stats = self.pool.stats()
        if self.cached is None and stats.cached == 0:
            self.cached = Counter()
            self.reuses = stats.reuse_count
        assert stats.quota == self.quota
        assert stats.used == self.used
        assert stats.used + stats.cached <= self.quota
        assert stats.available == self.quota - self.used
        assert stats.allocated_bytes == sum(h.block.size for h in self.held)
        assert stats.evicted_bytes == sum(h.block.size for h in self.held if h.evicted)
        assert stats.active_blocks == len(self.held)
        assert stats.allocation_count == self.allocations
        assert stats.eviction_count == self.evictions
        if self.cached is not None:
            assert stats.cached == self.cached_bytes
            assert stats.free_blocks == self.cached.total()
            assert stats.reuse_count == self.reuses

    def teardown(self) -> None:
        """Evicted contents come back, and the device is then as new."""
        if not hasattr(self, "pool"):
            return
        self.device.inject_fault(0)
        for held in self.held + self.leaving:
            held.tensors.clear()
        while self.held:
            held = self.held.pop()
            for other in self.held:
                if not other.block.is_evicted:
                    self.pool.evict(other.block)
            self.pool.restore(held.block)
            held.address = held.block.ptr
            held.check()
            self.pool.free(held.block)
        self.pool.clear()
        self.pool.check_invariants()
        assert self.pool.stats().resident == 0
        assert self.device.committed_bytes == 0


TestMemoryPool = MemoryPoolMachine.TestCase
TestMemoryPool.settings = settings(max_examples=300, stateful_step_count=50)
