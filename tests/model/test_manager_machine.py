"""Random programs on a whole device: contexts of all tiers, allocations, resizes, orphans, and
device calls that fail at any time. After every step the books are right and every byte is."""

import ctypes
from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pygpukit_torch import AdmissionError, DeviceError, native
from pygpukit_torch.native import Tier

MB = 1 << 20
CAPACITY = 32 * MB
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
    """Drives the native manager and a model of what each context holds."""

    @initialize()
    def start(self) -> None:
        self.device = native.HostDevice(CAPACITY)
        self.manager = native.Manager(self.device)
        self.live: list[Model] = []
        self.orphans: list[Model] = []
        self.serial = 0
        self.faulty = False

    def refused(self) -> None:
        """A refusal is only allowed to an injected fault or to lack of room; checked by callers."""
        self.device.inject_fault(0)
        self.faulty = False

    def room_for(self, model: Model | None) -> int:
        """Bytes that nobody else can claim, page rounding left out: a lower bound."""
        others = [m for m in self.live + self.orphans if m is not model]
        pages = sum(max(m.base, sum(b.size + 4 * MB for b in m.blocks)) for m in others)
        return CAPACITY - pages

    @rule(size=SIZES, share=st.sampled_from([0, 0, 1, 2]), best_effort=st.booleans())
    def create(self, size: int, share: int, best_effort: bool) -> None:
        size = max(size, 2 * MB)
        base = size * share // 2
        tier = {0: Tier.best_effort if best_effort else Tier.burstable, 1: Tier.burstable}.get(
            share, Tier.guaranteed
        )
        self.serial += 1
        fits = base <= self.room_for(None)
        try:
            context = self.manager.create_context(f"c{self.serial}", size, base, tier)
        except REFUSALS:
            assert self.faulty or not fits
            self.refused()
            return
        self.live.append(Model(context, size, base))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), size=st.one_of(st.integers(1, 4096), st.integers(1, 8 * MB)))
    def allocate(self, data: st.DataObject, size: int) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        fits_base = model.used == 0 and -(-size // (2 * MB)) * 2 * MB <= model.base
        try:
            address = model.context.allocate(size)
        except torch.OutOfMemoryError:
            # Nothing may keep an empty context from its own reservation.
            assert self.faulty or not fits_base
            self.refused()
            return
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
    @rule(data=st.data(), size=SIZES)
    def resize(self, data: st.DataObject, size: int) -> None:
        model = data.draw(st.sampled_from(self.live), label="context")
        size = max(size, 2 * MB)
        guaranteed = model.context.tier == Tier.guaranteed
        base = size if guaranteed else min(model.base, size)
        try:
            self.manager.resize_context(model.context, size, base)
        except ValueError:
            assert model.used > 0, "only live tensors keep a context from shrinking"
        except REFUSALS:
            assert self.faulty or base > 0
            self.refused()
        else:
            model.max, model.base = size, base

    @rule(calls=st.integers(1, 12))
    def fault(self, calls: int) -> None:
        self.device.inject_fault(calls)
        self.faulty = True

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
        whole = self.manager.create_context("whole", CAPACITY, CAPACITY, Tier.guaranteed)
        self.manager.check_invariants()
        assert len(self.manager.device_usage().contexts) == 1
        self.manager.destroy_context(whole)
        self.manager.check_invariants()
        assert self.device.committed_bytes == 0


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=300, stateful_step_count=40)
