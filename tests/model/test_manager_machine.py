"""Random programs on a whole device: contexts of all tiers, allocations, sessions, evictions by
need and by hand, resizes, orphans, partitions, and device calls that fail at any time. After every
step the books are right and every byte is."""

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pygpukit_torch import AdmissionError, ContextBusyError, DeviceError, native
from pygpukit_torch.native import Device, Tier

MB = 1 << 20
SIZES = st.integers(1, 24).map(lambda n: n * MB // 2)
SHARES = st.sampled_from([0, 0, 1, 2])  # half of a budget that is reserved
LIMITS = st.one_of(st.none(), st.integers(1, 32))  # of a partition's memory, in MiB
PARTS = st.sampled_from([None, 0.25, 0.5, 0.75])  # of the processors
GROUPS = [8, 8, 8, 12]  # of processors
REFUSALS = (torch.OutOfMemoryError, AdmissionError, DeviceError)


@dataclass
class Block:
    address: int
    size: int
    mark: int

    def write(self) -> None:
        for offset in (0, self.size - 1):
            ctypes.memset(self.address + offset, self.mark, 1)

    def check(self) -> None:
        for offset in (0, self.size - 1):
            assert ctypes.string_at(self.address + offset, 1) == bytes([self.mark])


@dataclass
class Model:
    context: native.Context
    max: int
    base: int
    partition: str | None = None
    is_fenced: bool = False  # blocks that were freed may still lie on pages
    blocks: list[Block] = field(default_factory=list)
    sessions: list[native.Session] = field(default_factory=list)

    @property
    def used(self) -> int:
        return sum(-(-block.size // 512) * 512 for block in self.blocks)


class ManagerMachine(RuleBasedStateMachine):
    """Drives the native manager and a model of what each context holds.

    Whether a request must succeed or fail is told by what the manager says is available, which
    is thereby tested too; only a fault that strikes in the very operation excuses a refusal.
    """

    claim_timeout = 0.002

    @initialize(
        data=st.data(),
        scale=st.sampled_from([1, 16]),
        backup=st.sampled_from([16, 4, 1, 0]),
        partitions=st.lists(st.tuples(LIMITS, PARTS), max_size=2),
        contexts=st.lists(st.tuples(SIZES, SHARES, st.booleans()), min_size=1, max_size=4),
    )
    def start(
        self,
        data: st.DataObject,
        scale: int,
        backup: int,
        partitions: list[tuple[int | None, float | None]],
        contexts: list[tuple[int, int, bool]],
    ) -> None:
        """At the larger scale budgets have pages of 2, 4 and 8 MiB, at the smaller of 2 only.

        The host memory for evicted pages is none, or a quarter of the capacity and more. There are
        contexts from the start: without any, most rules have nothing to do.
        """
        self.scale = scale
        self.capacity = 32 * MB * scale
        self.device = native.HostDevice(self.capacity, GROUPS)
        self.manager = native.Manager(
            self.device, host_backup=backup * self.capacity // 4, claim_timeout=self.claim_timeout
        )
        self.partitions = native.PartitionManager(
            native.PartitionConfig(self.capacity, allow_overcommit=True, overcommit_ratio=2.0),
            self.manager,
        )
        self.limits: dict[str, int | None] = {}  # of memory
        self.processors: dict[str, int] = {}  # as seen
        self.live: list[Model] = []
        self.orphans: list[Model] = []
        self.serial = 0
        self.fault_at = 0
        for each in partitions:
            self.create_partition(*each)
        for each in contexts:
            self.create(data, *each)

    def attempt(self, operation: Callable[[], Any]) -> tuple[Any, Exception | None, bool]:
        """What it returned, what it raised, and whether the fault struck in it."""
        before = self.device.count(Device.Call.any)
        result, error = None, None
        try:
            result = operation()
        except REFUSALS as raised:
            error = raised
        struck = before < self.fault_at <= self.device.count(Device.Call.any)
        return result, error, struck

    @rule(data=st.data(), size=SIZES, share=SHARES, best_effort=st.booleans())
    def create(self, data: st.DataObject, size: int, share: int, best_effort: bool) -> None:
        size = max(size, 2 * MB) * self.scale
        base = size * share // 2
        tier = {0: Tier.best_effort if best_effort else Tier.burstable, 1: Tier.burstable}.get(
            share, Tier.guaranteed
        )
        self.serial += 1
        partition = data.draw(st.sampled_from([None, *self.limits]), label="partition")
        limit = self.limits.get(partition or "")
        available = self.manager.device_usage().available
        unused = self.unused_of(partition)
        try:
            context, error, struck = self.attempt(
                lambda: self.manager.create_context(
                    f"c{self.serial}", size, base, tier, partition or ""
                )
            )
        except ValueError:
            assert limit is not None
            assert size > limit
            return
        if error is None:
            assert base <= available
            self.live.append(Model(context, size, base, partition))
        else:
            assert struck or base > min(available, unused)

    def unused_of(self, partition: str | None) -> int:
        """Bytes of the partition that no context has, or reserves. Free pages may come to that."""
        limit = self.limits.get(partition or "")
        if limit is None:
            return self.capacity
        usages = [
            self.manager.usage(model.context) for model in self.live if model.partition == partition
        ]
        return limit - sum(max(usage.base, usage.resident) for usage in usages)

    @rule(limit=LIMITS, share=PARTS)
    def create_partition(self, limit: int | None, share: float | None) -> None:
        self.serial += 1
        id = f"p{self.serial}"
        limits = native.PartitionLimits()
        if limit is not None:
            limits = limits.memory(max(limit, 2) * MB * self.scale)
        if share is not None:
            limits = limits.compute(share)
        before = self.partitions.stats()
        _, error, struck = self.attempt(lambda: self.partitions.create_partition(id, id, limits))
        if error is None:
            self.limits[id] = limits.memory_limit
        else:
            assert self.partitions.partition_ids == list(self.limits)
            memory = limits.memory_limit or 0
            assert (
                struck
                or memory > before.available_memory
                or (share or 0) > before.available_compute
                # Other partitions may have been granted what was left.
                or share is not None
            )

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def delete_partition(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(list(self.limits)), label="partition")
        if any(model.partition == id for model in self.live):
            with contextlib.suppress(ContextBusyError):
                self.partitions.delete_partition(id)
                raise AssertionError("a partition in use was deleted")
            return
        self.partitions.delete_partition(id)
        del self.limits[id]
        self.processors.pop(id, None)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def assign(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        id = data.draw(st.sampled_from([None, *self.limits]), label="partition")
        limit = self.limits.get(id or "")
        unused = self.unused_of(id)
        usage = self.manager.usage(model.context)
        try:
            _, error, struck = self.attempt(lambda: self.partitions.assign(model.context, id))
        except ContextBusyError:
            assert model.sessions
        except ValueError:
            assert limit is not None
            assert model.max > limit
        else:
            if error is None:
                model.partition = id
            else:
                assert struck or max(usage.base, usage.resident) > unused

    @precondition(lambda self: self.live)
    @rule(data=st.data(), size=st.one_of(st.integers(1, 4096), st.integers(4 * MB, 16 * MB)))
    def allocate(self, data: st.DataObject, size: int) -> None:
        self.allocate_in(data.draw(st.sampled_from(self.live), label="context"), size * self.scale)

    def allocate_in(self, model: Model, size: int) -> None:
        granular = -(-size // 512) * 512
        available = self.manager.usage(model.context).available
        address, error, struck = self.attempt(lambda: model.context.allocate(size))
        if granular > available:
            assert error is not None, "more was handed out than was available"
        elif not model.blocks and not self.waited_in_vain(model, error):
            assert struck or error is None, "an empty context did not get what was available"
        if error is None:
            model.blocks.append(self.written(model, address, size, len(model.blocks) % 255 + 1))

    def written(self, model: Model, address: int, size: int, mark: int) -> Block:
        block = Block(address, size, mark)
        block.write()
        return block

    def waited_in_vain(self, model: Model, error: Exception | None) -> bool:
        """Whether a claim of the base failed because of contexts of lower tiers that are in use:
        on the host device nobody can make them yield."""
        if error is None or "did not yield" not in str(error):
            return False
        lower = [
            other for other in self.live if other.context.tier.value < model.context.tier.value
        ]
        return any(other.sessions for other in lower)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def enter(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        evicted = self.manager.usage(model.context).evicted
        session = native.Session(model.context, ordered=False)
        _, error, struck = self.attempt(session.enter)
        if error is None:
            # A page without a live byte that the device would not unmap may stay behind.
            assert model.sessions or struck or self.manager.usage(model.context).evicted == 0
            if not model.sessions:
                self.is_where_it_belongs(model)
            model.sessions.append(session)
        else:
            assert evicted or struck, "a context that was here could not be entered"
            assert struck or isinstance(error, torch.OutOfMemoryError)

    def is_where_it_belongs(self, model: Model) -> None:
        """On the processors of its partition, which no other one has."""
        own = self.device.processors(model.context.stream)
        granted = model.partition and self.partitions.get(model.partition).sm_count
        if granted:
            assert sum(size for i, size in enumerate(GROUPS) if own >> i & 1) == granted
            assert self.processors.setdefault(str(model.partition), own) == own
        for id, others in self.processors.items():
            assert id == model.partition or own & others == 0

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        used = [model for model in self.live if model.sessions]
        if used:
            model = data.draw(st.sampled_from(used), label="context")
            model.sessions.pop(data.draw(st.integers(0, len(model.sessions) - 1))).exit()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        if model.sessions:
            with contextlib.suppress(ContextBusyError):
                self.manager.evict_context(model.context)
                raise AssertionError("a context in use was evicted")
            return
        _, error, struck = self.attempt(lambda: self.manager.evict_context(model.context))
        usage = self.manager.usage(model.context)
        if error is None:
            assert usage.evicted >= model.used
        else:
            assert struck or "host_backup" in str(error)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        _, error, struck = self.attempt(lambda: self.manager.restore_context(model.context))
        if error is None:  # as when it is entered
            assert model.sessions or struck or self.manager.usage(model.context).evicted == 0
        else:
            assert struck or isinstance(error, torch.OutOfMemoryError)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        holders = [model for model in self.live + self.orphans if model.blocks]
        if not holders:
            return
        model = data.draw(st.sampled_from(holders), label="context")
        block = model.blocks.pop(data.draw(st.integers(0, len(model.blocks) - 1)))
        block.check()
        model.context.free(block.address)
        if not model.blocks and model in self.orphans:
            self.orphans.remove(model)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def destroy(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        while model.sessions:
            model.sessions.pop().exit()
        self.manager.destroy_context(model.context)
        self.live.remove(model)
        model.base = 0
        if model.blocks:
            self.orphans.append(model)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), size=SIZES, full_base=st.booleans())
    def resize(self, data: st.DataObject, size: int, full_base: bool) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        size = max(size, 2 * MB) * self.scale
        page = model.context.page_bytes
        tier = model.context.tier
        base = size if tier == Tier.guaranteed else min(model.base, size)
        if full_base and tier == Tier.burstable:
            base = size
        usage = self.manager.usage(model.context)
        available = self.manager.device_usage().available
        own = max(usage.base, usage.resident)
        unused = self.unused_of(model.partition) + own
        try:
            _, error, struck = self.attempt(
                lambda: self.manager.resize_context(model.context, size, base)
            )
        except ValueError:
            # At worst every block lies on pages of its own.
            pages = sum(block.size // page + 2 for block in model.blocks)
            limit = self.limits.get(model.partition or "")
            too_small = size < max(page, pages * page) or model.is_fenced
            assert too_small or size > (limit or self.capacity)
            return
        if error is None:
            model.max, model.base = size, base
        else:
            assert struck or base > max(min(available, unused), usage.base), (
                "a resize was refused for nothing"
            )

    @rule(calls=st.integers(1, 12))
    def fault(self, calls: int) -> None:
        self.device.inject_fault(calls)
        self.fault_at = self.device.count(Device.Call.any) + calls

    @invariant()
    def books_and_bytes_are_right(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_invariants()
        for model in self.live:
            usage = self.manager.usage(model.context)
            assert (usage.used, usage.max, usage.base) == (model.used, model.max, model.base)
            assert usage.used <= usage.resident + usage.evicted <= usage.max
            assert usage.live_blocks == len(model.blocks)
            assert usage.partition == (model.partition or "")
            if not self.fault_at:
                # Whatever others borrow of it, and wherever they are.
                whole = model.base // model.context.page_bytes * model.context.page_bytes
                # But others may keep all of the page that their base ends in.
                cut = sum(o.context.page_bytes for o in self.live if o.base % o.context.page_bytes)
                assert usage.available >= whole - usage.resident - usage.evicted - cut
        for id, limit in self.limits.items():
            reserved = self.partitions.get(id).usage.reserved
            assert limit is None or reserved <= limit
        for model in self.live + self.orphans:
            for block in model.blocks:
                block.check()

    def teardown(self) -> None:
        """Everything can be given back, and the device is then as new."""
        if not hasattr(self, "manager"):
            return
        self.device.inject_fault(0)
        for model in self.live + self.orphans:
            for session in model.sessions:
                session.exit()
            for block in model.blocks:
                model.context.free(block.address)
        for model in self.live:
            self.manager.destroy_context(model.context)
        whole = self.manager.create_context("whole", self.capacity, self.capacity, Tier.guaranteed)
        self.manager.check_invariants()
        assert len(self.manager.device_usage().contexts) == 1
        self.manager.destroy_context(whole)
        self.manager.check_invariants()
        assert self.device.committed_bytes == 0
        assert self.device.backup_bytes == 0


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=300, stateful_step_count=40)
