"""Random programs on a whole device: contexts of all tiers, allocations, resizes, orphans, and
device calls that fail at any time. After every step the books are right and every byte is."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pygpukit_torch import AdmissionError, DeviceError, native
from pygpukit_torch.native import Device, Tier

MB = 1 << 20
SIZES = st.integers(1, 24).map(lambda n: n * MB // 2)
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
    blocks: list[Block] = field(default_factory=list)

    @property
    def used(self) -> int:
        return sum(-(-block.size // 512) * 512 for block in self.blocks)


class ManagerMachine(RuleBasedStateMachine):
    """Drives the native manager and a model of what each context holds.

    Whether a request must succeed or fail is told by what the manager says is available, which
    is thereby tested too; only a fault that strikes in the very operation excuses a refusal.
    """

    @initialize(scale=st.sampled_from([1, 16]))
    def start(self, scale: int) -> None:
        """At the larger scale budgets have pages of 2, 4 and 8 MiB, at the smaller of 2 only."""
        self.scale = scale
        self.capacity = 32 * MB * scale
        self.device = native.HostDevice(self.capacity)
        self.manager = native.Manager(self.device)
        self.live: list[Model] = []
        self.orphans: list[Model] = []
        self.serial = 0
        self.fault_at = 0

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

    @rule(size=SIZES, share=st.sampled_from([0, 0, 1, 2]), best_effort=st.booleans())
    def create(self, size: int, share: int, best_effort: bool) -> None:
        size = max(size, 2 * MB) * self.scale
        base = size * share // 2
        tier = {0: Tier.best_effort if best_effort else Tier.burstable, 1: Tier.burstable}.get(
            share, Tier.guaranteed
        )
        self.serial += 1
        available = self.manager.device_usage().available
        context, error, struck = self.attempt(
            lambda: self.manager.create_context(f"c{self.serial}", size, base, tier)
        )
        assert struck or (error is None) == (base <= available)
        if error is None:
            self.live.append(Model(context, size, base))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), size=st.one_of(st.integers(1, 4096), st.integers(1, 8 * MB)))
    def allocate(self, data: st.DataObject, size: int) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        size *= self.scale
        granular = -(-size // 512) * 512
        available = self.manager.usage(model.context).available
        address, error, struck = self.attempt(lambda: model.context.allocate(size))
        if granular > available:
            assert error is not None, "more was handed out than was available"
        elif not model.blocks:
            assert struck or error is None, "an empty context did not get what was available"
        if error is None:
            block = Block(address, size, len(model.blocks) % 255 + 1)
            block.write()
            model.blocks.append(block)

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
        try:
            _, error, struck = self.attempt(
                lambda: self.manager.resize_context(model.context, size, base)
            )
        except ValueError:
            # At worst every block lies on pages of its own.
            pages = sum(block.size // page + 2 for block in model.blocks)
            assert size < page or size < pages * page
            return
        if error is None:
            model.max, model.base = size, base
        else:
            assert struck or base > max(available, usage.base), "a resize was refused for nothing"

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
            assert usage.used <= usage.resident <= usage.max
            assert usage.live_blocks == len(model.blocks)
        for model in self.live + self.orphans:
            for block in model.blocks:
                block.check()

    def teardown(self) -> None:
        """Everything can be given back, and the device is then as new."""
        if not hasattr(self, "manager"):
            return
        self.device.inject_fault(0)
        for model in self.live + self.orphans:
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


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=300, stateful_step_count=40)
