"""The random programs of test_manager_machine.py with work on streams: pages move only when nothing
that is queued touches them, and every copy finds its bytes where it left them.

A few programs are run unless the environment says how many, and how many steps each has at most:

    MOVING_PROGRAMS=2000 MOVING_STEPS=60 pytest tests/model/test_moving_machine.py
"""

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from pygpukit_torch import ContextBusyError, DeviceError, native
from tests.model.test_manager_machine import (
    LIMITS,
    MB,
    PARTS,
    SHARES,
    Block,
    ManagerMachine,
    Model,
)

P = ParamSpec("P")
R = TypeVar("R")

PROGRAMS = int(os.environ.get("MOVING_PROGRAMS", "100"))
STEPS = int(os.environ.get("MOVING_STEPS", "50"))
SOON = 0.003  # seconds until streams are let go; well below the claim_timeout
PATIENCE = 0.5  # seconds; for what waits for a held stream without a limit
SIDE_STREAMS = 3
BUDGETS = st.integers(1, 6).map(lambda n: n * 4 * MB)  # halves are whole pages

MARKS = (ctypes.c_uint8 * 256)(*range(256))


@dataclass(eq=False)
class UsedBlock(Block):
    """A block that streams work on. The mark is what is there now, not what is queued."""

    stream: int = 0  # which it was allocated for
    named: set[int] = field(default_factory=set)  # streams, by record_use
    is_written: bool = False

    def check(self) -> None:
        if self.is_written:
            super().check()


@dataclass(eq=False)
class Work:
    """A queued copy of a block's first byte to the first and the last of another one."""

    target: UsedBlock
    source: UsedBlock | None  # None: the mark is written
    mark: int
    event: int  # done once the copy is

    def apply(self) -> None:
        self.target.mark = self.mark if self.source is None else self.source.mark
        self.target.is_written = True


class MovingMachine(ManagerMachine):
    """Adds streams that are held and let go, and copies on them within and between contexts.

    Programs keep the rules: work of different streams is not in conflict, since nothing orders it,
    and a block is freed in the order of its own stream, of those that were named for it, and of
    those that the free names. The manager may have streams wait for each other, so events tell how
    far each one is.

    While a stream is held, whatever may have to wait for it may be refused. So may what needs a
    producer's pages while a declared consumer is in a session.
    """

    claim_timeout = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0  # with held streams
        self.held: set[int] = set()
        self.side_streams: list[int] = []
        self.work: dict[int, list[Work]] = {}  # per stream, in order
        self.declared: list[tuple[Model, Model]] = []  # producers and consumers
        self.daemons: list[native.Session] = []

    @initialize(
        data=st.data(),
        scale=st.sampled_from([1, 1, 1, 4]),
        backup=st.sampled_from([16, 4, 2]),
        partitions=st.lists(st.tuples(LIMITS, PARTS), max_size=1),
        contexts=st.lists(st.tuples(BUDGETS, SHARES, st.booleans()), min_size=2, max_size=4),
    )
    def start(
        self,
        data: st.DataObject,
        scale: int,
        backup: int,
        partitions: list[tuple[int | None, float | None]],
        contexts: list[tuple[int, int, bool]],
    ) -> None:
        """Contexts that are full of two blocks each: not all of them have room at a time."""
        super().start(data, scale, backup, partitions, contexts)
        for model in list(self.live):
            for _ in range(2):
                self.allocate_in(model, model.max // 2)

    # What is under way ----------------------------------------------------------------------------

    def attempt(self, operation: Callable[[], Any]) -> tuple[Any, Exception | None, bool]:
        """As in the base; what cannot be expected to succeed counts as struck by a fault.

        Every third time that streams are held they are let go while the operation waits for them.
        Otherwise it may give up, and is helped only if it does not.
        """
        is_excused = bool(self.held) or any(consumer.sessions for _, consumer in self.declared)
        if not self.held:
            return self.attempt_or_excuse(operation, is_excused)
        self.attempts += 1
        is_helped = self.attempts % 3 == 0
        helper = threading.Timer(SOON if is_helped else PATIENCE, self.let_all_go_now)
        helper.start()
        try:
            return self.attempt_or_excuse(operation, is_excused)
        finally:
            helper.cancel()
            helper.join()
            if is_helped:  # whether the helper came to it depends on the time
                self.let_all_go_now()

    def attempt_or_excuse(
        self, operation: Callable[[], Any], is_excused: bool
    ) -> tuple[Any, Exception | None, bool]:
        try:
            result, error, struck = super().attempt(operation)
        except ContextBusyError as busy:
            if not is_excused:
                raise
            return None, busy, True
        return result, error, struck or is_excused

    def let_all_go_now(self) -> None:
        for stream in sorted(self.held):
            self.device.let_go(stream)
        self.held.clear()

    def catch_up(self) -> None:
        """Have the model do what the streams have done."""
        # A context's stream that was held without work may have gone with it.
        self.held -= {stream for stream in self.held if self.device.is_idle(stream)}
        for stream, queue in self.work.items():
            while queue and self.device.is_done(queue[0].event):
                queue.pop(0).apply()
            assert not queue or self.held, f"stream {stream} stands still"

    def surely(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Faults strike once."""
        try:
            return call(*args, **kwargs)
        except DeviceError:
            return call(*args, **kwargs)

    def queue(
        self, stream: int, target: UsedBlock, source: UsedBlock | None, mark: int = 0
    ) -> None:
        origin = ctypes.addressof(MARKS) + mark if source is None else source.address
        for offset in (0, target.size - 1):
            self.surely(self.device.copy, target.address + offset, origin, 1, stream)
        event = self.surely(self.device.record, stream)
        self.work.setdefault(stream, []).append(Work(target, source, mark, event))

    def may_copy(self, stream: int, target: UsedBlock, source: UsedBlock) -> bool:
        """Whether no other stream has work that the copy would have to be ordered with."""
        others = [w for other, queue in self.work.items() if other != stream for w in queue]
        return not any(w.target in (target, source) or w.source is target for w in others)

    def written(self, model: Model, address: int, size: int, mark: int) -> Block:
        """In the order of the stream: what was there before may still be in use."""
        block = UsedBlock(address, size, mark, model.context.stream)
        self.queue(block.stream, block, None, mark)
        return block

    # Streams --------------------------------------------------------------------------------------

    def streams(self) -> list[int]:
        own = {model.context.stream for model in self.live + self.orphans} - {0}
        return [*sorted(own), *self.side_streams]

    def holders(self) -> list[Model]:
        return [model for model in self.live + self.orphans if model.blocks]

    def draw_block(self, data: st.DataObject, model: Model, label: str) -> UsedBlock:
        block = data.draw(st.sampled_from(model.blocks), label=label)
        assert isinstance(block, UsedBlock)
        return block

    @precondition(lambda self: self.streams())
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.streams()), label="stream")
        self.device.hold(stream)
        self.held.add(stream)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.held)), label="stream")
        self.held.remove(stream)
        self.device.let_go(stream)

    @precondition(lambda self: self.held)
    @rule()
    def let_all_go(self) -> None:
        self.let_all_go_now()

    @precondition(lambda self: self.holders())
    @rule(data=st.data(), is_held=st.booleans(), is_declared=st.booleans())
    def hand_over(self, data: st.DataObject, is_held: bool, is_declared: bool) -> None:
        """A context's stream reads a block of another context, or its own."""
        producer = data.draw(st.sampled_from(self.holders()), label="producer")
        consumer = data.draw(st.sampled_from(self.holders()), label="consumer")
        source = self.draw_block(data, producer, "source")
        target = self.draw_block(data, consumer, "target")
        stream = consumer.context.stream
        if stream == 0 or not self.may_copy(stream, target, source):
            return
        if is_held:
            self.device.hold(stream)
            self.held.add(stream)
        if is_declared and producer in self.live and consumer in self.live:
            self.manager.declare_consumer(producer.context, consumer.context)
            self.declared.append((producer, consumer))
        self.queue(stream, target, source)

    @rule()
    def create_side_stream(self) -> None:
        if len(self.side_streams) < SIDE_STREAMS:
            self.side_streams.append(self.surely(self.device.create_stream))

    @precondition(lambda self: self.side_streams)
    @rule(data=st.data())
    def destroy_side_stream(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.side_streams), label="stream")
        if stream not in self.held and not self.work.get(stream) and self.device.is_idle(stream):
            self.surely(self.device.destroy_stream, stream)
            self.side_streams.remove(stream)

    @precondition(lambda self: self.side_streams and self.holders())
    @rule(data=st.data(), is_held=st.booleans())
    def copy_on_side_stream(self, data: st.DataObject, is_held: bool) -> None:
        """The stream is named for both blocks before the copy is queued."""
        stream = data.draw(st.sampled_from(self.side_streams), label="stream")
        blocks = []
        for label in ("source", "target"):
            model = data.draw(st.sampled_from(self.holders()), label=label)
            block = self.draw_block(data, model, label)
            if stream not in block.named:
                model.context.record_use(block.address, stream)
                block.named.add(stream)
            blocks.append(block)
        source, target = blocks
        if is_held:
            self.device.hold(stream)
            self.held.add(stream)
        if self.may_copy(stream, target, source):
            self.queue(stream, target, source)

    # What streams change about the base's rules ---------------------------------------------------

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """As by whoever is in a session of the context whose stream uses the block last."""
        if not self.holders():
            return
        model = data.draw(st.sampled_from(self.holders()), label="context")
        block = self.draw_block(data, model, "block")
        block.check()
        model.blocks.remove(block)
        ordered = {block.stream, model.context.stream} | block.named
        foreign = [
            stream
            for stream, queue in self.work.items()
            if stream not in ordered and any(block in (w.target, w.source) for w in queue)
        ]
        model.is_fenced |= bool(self.held)
        if foreign:
            model.context.free_after(block.address, foreign)
        else:
            model.context.free(block.address)
        if not model.blocks and model in self.orphans:
            self.orphans.remove(model)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def destroy(self, data: st.DataObject) -> None:
        before = list(self.live)
        super().destroy(data)
        gone = [model for model in before if model not in self.live]
        self.declared = [
            pair for pair in self.declared if pair[0] not in gone and pair[1] not in gone
        ]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def enter_as_daemon(self, data: st.DataObject) -> None:
        """Does not keep the context where it is; work that is queued meanwhile does."""
        model = data.draw(st.sampled_from(self.live), label="context")
        evicted = self.manager.usage(model.context).evicted
        session = native.Session(model.context, ordered=False, keeps_active=False)
        _, error, struck = self.attempt(session.enter)
        if error is None:
            self.daemons.append(session)
        else:
            assert evicted or struck, "a context that was here could not be entered"

    @precondition(lambda self: self.daemons)
    @rule(data=st.data())
    def leave_as_daemon(self, data: st.DataObject) -> None:
        self.daemons.pop(data.draw(st.integers(0, len(self.daemons) - 1), label="daemon")).exit()

    @invariant()
    def books_and_bytes_are_right(self) -> None:
        if not hasattr(self, "manager"):
            return
        assert self.device.refused_moves == 0
        self.catch_up()
        super().books_and_bytes_are_right()

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.device.inject_fault(0)
            self.let_all_go_now()
            self.catch_up()
            while self.daemons:
                self.daemons.pop().exit()
        super().teardown()


TestMoving = MovingMachine.TestCase
TestMoving.settings = settings(max_examples=PROGRAMS, stateful_step_count=STEPS)
