"""Limited sessions: who waits, who is let in next, and that nothing is lost on the way."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import pygpukit_torch as pgk
from pygpukit_torch import (
    MB,
    ContextBusyError,
    ContextDestroyedError,
    QoSPolicy,
    SessionError,
    SessionTimeoutError,
    context_session,
    native,
)
from tests.turns import (
    PATIENCE,
    Occupant,
    background,
    is_free,
    share_gate,
    wait_until,
    waiting,
)
from tests.unit.test_fork import in_child

Tier = native.Tier

# The queue alone ----------------------------------------------------------------------------------

# Gates by name: their limits. Contexts: their tier, the limit of their own, their partition's gate.
GATES = {"p": 2}
CONTEXTS = [
    (Tier.best_effort, 0, "p"),
    (Tier.burstable, 1, "p"),
    (Tier.guaranteed, 1, "p"),
    (Tier.burstable, 2, None),
]


indices = st.integers(0, len(CONTEXTS) - 1)
numbers = st.one_of(st.just([]), st.lists(st.integers(0, 7), max_size=3))


@dataclass(eq=False)
class Slot:
    gate: str
    holders: int = 0


@dataclass(eq=False)
class Entry:
    """What the model knows of a ticket."""

    ticket: native.SessionTicket
    index: int  # of the context; -1 for what only inherits
    slots: list[Slot] = field(default_factory=list)
    waits: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        return -list(Tier.__members__.values()).index(CONTEXTS[self.index][0]), self.ticket.number

    @property
    def wanted(self) -> set[str]:
        return {slot.gate for slot in self.slots if slot.holders == 0}


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, ends and contexts that go, against the rule as it is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = native.Manager(native.HostDevice(64 * MB))
        self.gates = {name: native.SessionGate(name, limit) for name, limit in GATES.items()}
        self.bell = native.TurnBell()
        self.rung: set[int] = set()
        self.contexts: list[native.Context] = []
        self.created = 0
        self.all: list[Entry] = []
        for index in range(len(CONTEXTS)):
            self.contexts.append(self.create(index))

    def create(self, index: int) -> native.Context:
        tier, own, partition = CONTEXTS[index]
        self.created += 1
        name = f"{index}-{self.created}"
        base = 2 * MB if tier is Tier.guaranteed else 0
        context = self.manager.create_context(name, 2 * MB, base, tier, max_sessions=own)
        if partition is not None:
            context.set_partition_gate(self.gates[partition])
        return context

    def gates_of(self, index: int) -> dict[str, int]:
        """Their limits."""
        _, own, partition = CONTEXTS[index]
        limits = {self.contexts[index].name: own} if own else {}
        return limits if partition is None else limits | {partition: GATES[partition]}

    def open(self, gate: str) -> int:
        taken = {slot for entry in self.all for slot in entry.slots if slot.holders > 0}
        return sum(slot.gate == gate for slot in taken)

    def can_enter(self, entry: Entry) -> bool:
        limits = self.gates_of(entry.index)
        return all(self.open(gate) < limits[gate] for gate in entry.wanted)

    def let_in(self) -> None:
        """The rule: whoever can enter does, the first in rank first."""
        while ready := [entry for entry in self.all if entry.waits and self.can_enter(entry)]:
            first = min(ready, key=lambda entry: entry.rank)
            first.waits = False
            for slot in first.slots:
                slot.holders = max(slot.holders, 1)

    def picked(self, numbers: list[int]) -> list[Entry]:
        """Of those that have slots or wait for them; small numbers are the latest."""
        live = [entry for entry in reversed(self.all) if entry.slots]
        return [live[number % len(live)] for number in numbers if live]

    @rule(arrivals=st.lists(st.tuples(indices, numbers), min_size=1, max_size=5))
    def arrive(self, arrivals: list[tuple[int, list[int]]]) -> None:
        for index, within in arrivals:
            self.arrive_one(index, self.picked(within))

    def arrive_one(self, index: int, around: list[Entry]) -> None:
        ticket = native.queue_up(self.contexts[index], [entry.ticket for entry in around])
        assert ticket is not None
        ticket.notify(self.bell)
        entry = Entry(ticket, index, waits=True)
        shared = [slot for other in around for slot in other.slots if slot.holders > 0]
        for gate in self.gates_of(index):
            slot = next((slot for slot in shared if slot.gate == gate), None) or Slot(gate)
            slot.holders += slot.holders > 0
            entry.slots.append(slot)
        self.all.append(entry)
        self.let_in()

    @rule(numbers=numbers)
    def inherit(self, numbers: list[int]) -> None:
        around = self.picked(numbers)
        ticket = native.SessionTicket.inherited([entry.ticket for entry in around])
        assert ticket is not None
        open_slots = [slot for other in around for slot in other.slots if slot.holders > 0]
        entry = Entry(ticket, -1, open_slots)
        ticket.notify(self.bell)
        self.all.append(entry)

    @rule(number=st.integers(0, 7))
    def end(self, number: int) -> None:
        """Also of one that waits, and of one that has no slot of its own."""
        for entry in self.picked([number]):
            self.end_one(entry)

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 50))
    def end_once_more(self, number: int) -> None:
        self.end_one(self.all[number % len(self.all)])

    def end_one(self, entry: Entry) -> None:
        entry.ticket.end()
        entry.waits = False
        if entry.index >= 0:
            for slot in entry.slots:
                slot.holders -= slot.holders > 0
        entry.slots = []
        self.let_in()

    @rule(index=indices)
    def destroy(self, index: int) -> None:
        """Nobody waits for it any more; who has slots keeps them until he ends."""
        self.manager.destroy_context(self.contexts[index])
        assert native.queue_up(self.contexts[index], []) is None
        for entry in self.all:
            if entry.index == index:
                entry.waits = False
        self.contexts[index] = self.create(index)

    @invariant()
    def agrees_with_the_rule(self) -> None:
        for entry in self.all:
            assert entry.ticket.is_waiting == entry.waits
        self.rung.update(self.bell.take())
        assert self.rung == {entry.ticket.number for entry in self.all if not entry.waits}
        for name, gate in self.gates.items():
            assert gate.open == self.open(name) <= gate.limit
            assert gate.waiting == sum(e.waits and name in e.wanted for e in self.all)
        for index, context in enumerate(self.contexts):
            assert context.waiting == sum(e.waits and e.index == index for e in self.all)

    def teardown(self) -> None:
        for entry in self.all:
            entry.ticket.end()
        for gate in self.gates.values():
            assert gate.open == gate.waiting == 0


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=200, stateful_step_count=30)


@pytest.mark.parametrize("needs_both_first", [True, False])
def test_two_slots_that_come_free_at_once_let_in_the_first_in_rank(needs_both_first: bool) -> None:
    """Not whoever needs only the one that happens to be given back first."""
    manager = native.Manager(native.HostDevice(64 * MB))
    gate = native.SessionGate("p", 2)
    limited = manager.create_context("limited", 2 * MB, max_sessions=1)
    other = manager.create_context("other", 2 * MB)
    for context in (limited, other):
        context.set_partition_gate(gate)

    def arrive(context: native.Context, *around: native.SessionTicket) -> native.SessionTicket:
        ticket = native.queue_up(context, list(around))
        assert ticket is not None
        return ticket

    inside, beside = arrive(limited), arrive(other)
    around = [[], [beside]] if needs_both_first else [[beside], []]
    first, second = (arrive(limited, *within) for within in around)
    third = arrive(other)
    assert [ticket.is_waiting for ticket in (first, second, third)] == [True] * 3
    inside.end()
    # Who shares the other gate's slot leaves one there for the third.
    assert [ticket.is_waiting for ticket in (first, second, third)] == [
        False,
        True,
        needs_both_first,
    ]
    third.end()
    first.end()
    assert not second.is_waiting


def test_one_end_may_let_in_two() -> None:
    manager = native.Manager(native.HostDevice(64 * MB))
    limited = manager.create_context("limited", 2 * MB, max_sessions=1)
    other = manager.create_context("other", 2 * MB)
    gate = native.SessionGate("p", 2)
    for context in (limited, other):
        context.set_partition_gate(gate)
    inside, beside = native.queue_up(limited, []), native.queue_up(other, [])
    assert inside is not None
    assert beside is not None
    within, another = native.queue_up(limited, [beside]), native.queue_up(other, [])
    assert within is not None
    assert another is not None
    assert within.is_waiting
    assert another.is_waiting
    inside.end()
    assert not within.is_waiting
    assert not another.is_waiting


def test_a_gate_lets_at_least_one_in() -> None:
    with pytest.raises(ValueError, match="p must let at least one session in"):
        native.SessionGate("p", 0)


# Threads ------------------------------------------------------------------------------------------


@pytest.fixture
def one(scheduler: None) -> pgk.ExecutionContext:
    return pgk.create_context("one", 8 * MB, max_sessions=1)


@pytest.fixture
def tiers(scheduler: None) -> dict[str, pgk.ExecutionContext]:
    return {
        policy.value: pgk.create_context(policy.value, 8 * MB, qos=policy) for policy in QoSPolicy
    }


def test_no_more_are_let_in_than_the_limit(scheduler: None) -> None:
    context = pgk.create_context("three", 8 * MB, max_sessions=3)
    assert context.max_sessions == 3
    occupants = [Occupant(context) for _ in range(5)]
    wait_until(lambda: waiting(context) == 2)
    assert sum(occupant.is_in for occupant in occupants) == 3
    (stats,) = pgk.stats().contexts
    assert (stats.sessions, stats.waiting) == (3, 2)
    for left in range(5):
        next(o for o in occupants if o.is_in and not o.thread.done()).leave()
        wait_until(lambda left=left: sum(o.is_in for o in occupants) == min(5, 4 + left))
    assert waiting(context) == 0
    assert context.state == "idle"


def test_without_a_limit_nobody_waits(scheduler: None) -> None:
    context = pgk.create_context("any", 8 * MB)
    assert context.max_sessions is None
    assert native.queue_up(context._native) is None
    with Occupant(context), Occupant(context, timeout=0):
        assert is_free(context)


def test_tiers_go_first_then_whoever_came_first(tiers: dict[str, pgk.ExecutionContext]) -> None:
    gate = share_gate(1, *tiers.values())
    order: list[str] = []

    def come(name: str) -> None:
        with context_session(tiers[name.split()[0]]):
            order.append(name)

    threads = []
    with Occupant(tiers["burstable"]):
        for number, tier in enumerate(["best_effort", "burstable", "guaranteed"] * 3):
            threads.append(background(come, f"{tier} {number}"))
            wait_until(lambda number=number: gate.waiting == number + 1)
        assert not order
        assert gate.open == 1
    for thread in threads:
        thread.result(PATIENCE)
    assert order == [
        *("guaranteed 2", "guaranteed 5", "guaranteed 8"),
        *("burstable 1", "burstable 4", "burstable 7"),
        *("best_effort 0", "best_effort 3", "best_effort 6"),
    ]
    assert gate.open == gate.waiting == 0


def test_who_waits_for_one_gate_holds_no_slot_of_another(scheduler: None) -> None:
    important = pgk.create_context("a", 8 * MB, qos=QoSPolicy.GUARANTEED, max_sessions=1)
    low = pgk.create_context("b", 8 * MB, qos=QoSPolicy.BEST_EFFORT)
    gate = share_gate(2, important, low)
    with Occupant(important) as first:
        second = Occupant(important)
        wait_until(lambda: waiting(important) == 1)
        assert gate.open == 1
        assert gate.waiting == 1
        with Occupant(low), pytest.raises(SessionTimeoutError), context_session(low, timeout=0):
            pass
        with Occupant(low):
            third = Occupant(low)
            wait_until(lambda: waiting(low) == 1)
            # Both of its slots come free at once: nobody of a lower tier gets in between.
            first.leave()
            second.enter()
            assert not third.is_in
            assert waiting(low) == 1
        second.leave()
        third.enter().leave()
    assert gate.open == gate.waiting == 0


def test_what_is_entered_within_takes_no_slot(one: pgk.ExecutionContext) -> None:
    other = pgk.create_context("other", 8 * MB)
    gate = share_gate(1, one, other)
    session = context_session(one)
    with session:
        outsider = Occupant(other)
        wait_until(lambda: gate.waiting == 1)
        with session, context_session(one, timeout=0), context_session(other, timeout=0):
            with session:
                assert pgk.current_context() is one
                assert gate.open == 1
            assert pgk.current_context() is other
        assert not outsider.is_in
        assert gate.open == 1
        assert not is_free(one)
    outsider.enter()
    assert not is_free(one)
    outsider.leave()
    assert is_free(one)


def test_a_slot_is_kept_until_the_last_one_who_shares_it_has_left(
    one: pgk.ExecutionContext,
) -> None:
    """Suspended generators end in any order."""

    def steps() -> Iterator[None]:
        with context_session(one):
            yield

    outer, inner = steps(), steps()
    next(outer)
    next(inner)
    next(outer, None)
    assert pgk.current_context() is one
    assert not is_free(one)
    next(inner, None)
    assert is_free(one)


@pytest.mark.parametrize("daemon", [False, True])
def test_threads_that_are_started_inside_are_in(one: pgk.ExecutionContext, daemon: bool) -> None:
    entered, go_on = threading.Event(), threading.Event()
    found: list[object] = []

    def work() -> None:
        with context_session(one, timeout=0):
            found.append(pgk.current_context())
        entered.set()
        go_on.wait(PATIENCE)
        # By now it is in the context by inheritance alone, and like anybody else.
        found.append(is_free(one))
        try:
            with context_session(one, timeout=0):
                found.append("free")
        except SessionTimeoutError:
            found.append("full")

    with context_session(one), context_session(pgk.create_context("other", 8 * MB)):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(is_free, one).result(PATIENCE) is False
        with context_session(one):
            thread = threading.Thread(target=work, daemon=daemon)
            thread.start()
        assert entered.wait(PATIENCE)
    with Occupant(one):
        go_on.set()
        thread.join(PATIENCE)
    assert found == [one, False, "full"]
    assert is_free(one)


def test_threads_know_the_sessions_further_out(one: pgk.ExecutionContext) -> None:
    other = pgk.create_context("other", 8 * MB)

    def work() -> object:
        with context_session(one, timeout=0):
            return pgk.current_context()

    with context_session(one), context_session(other), ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result(PATIENCE) is one
        assert isinstance(background(work).exception(PATIENCE), SessionTimeoutError)
    assert is_free(one)


def test_an_exception_gives_the_slot_back(one: pgk.ExecutionContext) -> None:
    with pytest.raises(ZeroDivisionError), context_session(one):
        _ = 1 / 0
    assert is_free(one)


def test_a_session_object_is_not_what_has_the_slot(scheduler: None) -> None:
    context = pgk.create_context("two", 8 * MB, max_sessions=2)
    session = context_session(context, wait=False)
    leave = threading.Event()

    def work() -> None:
        with session:
            leave.wait(PATIENCE)

    threads = [background(work) for _ in range(3)]
    wait_until(lambda: waiting(context) == 1)
    assert not is_free(context)
    leave.set()
    for thread in threads:
        thread.result(PATIENCE)
    assert is_free(context)


def test_left_in_another_thread(one: pgk.ExecutionContext) -> None:
    session = context_session(one)
    session.__enter__()
    assert not is_free(one)
    error = background(session.__exit__, None, None, None).exception(PATIENCE)
    assert isinstance(error, SessionError)
    assert is_free(one)


def test_dropped_while_entered(one: pgk.ExecutionContext) -> None:
    session = context_session(one)
    session.__enter__()
    assert not is_free(one)
    del session
    assert is_free(one)


def test_a_thread_that_dies_inside(one: pgk.ExecutionContext) -> None:
    sessions = []

    def work() -> None:
        sessions.append(context_session(one))
        sessions[0].__enter__()

    background(work).result(PATIENCE)
    with context_session(one, timeout=PATIENCE):
        pass


def test_generators_have_a_slot_while_they_run(one: pgk.ExecutionContext) -> None:
    @context_session(one)
    def steps() -> Iterator[bool]:
        yield is_free(one)
        yield is_free(one)

    generator = steps()
    assert next(generator) is False
    assert is_free(one)
    with Occupant(one):
        advanced = background(next, generator)
        wait_until(lambda: waiting(one) == 1)
    assert advanced.result(PATIENCE) is False
    assert is_free(one)


def test_place_waits_for_its_turn(one: pgk.ExecutionContext) -> None:
    tensor = torch.ones(1000)
    with Occupant(one):
        placed = background(one.place, tensor)
        wait_until(lambda: waiting(one) == 1)
    assert torch.equal(placed.result(PATIENCE), tensor)


# Giving up ----------------------------------------------------------------------------------------


def test_a_turn_that_does_not_come_in_time(one: pgk.ExecutionContext) -> None:
    with Occupant(one):
        other = Occupant(one)
        wait_until(lambda: waiting(one) == 1)
        with (
            pytest.raises(
                SessionTimeoutError,
                match=r"^context 'one' was not entered: it was not its turn within 0\.01 s "
                r"\(context 'one': 1 of 1 sessions open, 1 others waiting\)$",
            ) as caught,
            context_session(one, timeout=0.01),
        ):
            pass
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, SessionError)
        with (
            pytest.raises(SessionTimeoutError, match="within 0 s"),
            context_session(one, timeout=0),
        ):
            pass
        assert pgk.current_context() is None
        assert waiting(one) == 1
    other.enter().leave()
    with context_session(one, timeout=0):
        pass
    assert is_free(one)


def test_every_gate_is_named(one: pgk.ExecutionContext) -> None:
    gate = share_gate(3, one)
    text = (
        r"\(context 'one': 1 of 1 sessions open, 0 others waiting; "
        r"partition 'p': 1 of 3 sessions open, 0 others waiting\)$"
    )
    with Occupant(one):
        with pytest.raises(SessionTimeoutError, match=text), context_session(one, timeout=0):
            pass
        assert gate.waiting == 0


def test_destroying_refuses_who_waits(tiers: dict[str, pgk.ExecutionContext]) -> None:
    gate = share_gate(1, *tiers.values())
    going, staying = tiers["guaranteed"], tiers["burstable"]
    with Occupant(staying):
        refused = [Occupant(going) for _ in range(3)]
        other = Occupant(staying)
        wait_until(lambda: gate.waiting == 4)
        going.destroy()
        for occupant in refused:
            with pytest.raises(ContextDestroyedError, match="'guaranteed' has been destroyed"):
                occupant.leave()
        assert gate.waiting == 1
        with pytest.raises(ContextDestroyedError), context_session(going):
            pass
    other.enter().leave()
    assert gate.open == gate.waiting == 0


def test_open_sessions_keep_the_context_though_others_wait(one: pgk.ExecutionContext) -> None:
    with Occupant(one):
        other = Occupant(one)
        wait_until(lambda: waiting(one) == 1)
        with pytest.raises(ContextBusyError, match="1 open session"):
            one.destroy()
        assert waiting(one) == 1
    other.enter().leave()


def test_a_signal_interrupts_the_main_thread_only_if_its_handler_raises(
    one: pgk.ExecutionContext,
) -> None:
    handled = []
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))

    def interrupt() -> None:
        wait_until(lambda: waiting(one) == 1)
        signal.pthread_kill(main, signal.SIGUSR1)
        wait_until(lambda: len(handled) == 1)
        assert waiting(one) == 1
        signal.pthread_kill(main, signal.SIGINT)

    try:
        with Occupant(one):
            interrupting = background(interrupt)
            with pytest.raises(KeyboardInterrupt), context_session(one):
                pass
            interrupting.result(PATIENCE)
            assert waiting(one) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert pgk.current_context() is None
    assert is_free(one)


# Coming back --------------------------------------------------------------------------------------


def test_an_evicted_context_stays_out_until_it_is_its_turn(
    tiers: dict[str, pgk.ExecutionContext],
) -> None:
    gate = share_gate(1, *tiers.values())
    out = tiers["burstable"]
    with context_session(out):
        tensor = torch.ones(MB, dtype=torch.uint8)
    out.evict()
    with Occupant(tiers["best_effort"]):
        occupant = Occupant(out)
        wait_until(lambda: gate.waiting == 1)
        assert out.usage().evicted > 0
        assert out.state == "idle"
    occupant.enter()
    assert out.usage().evicted == 0
    occupant.leave()
    assert tensor.eq(1).all()


def test_a_context_that_cannot_come_back_gives_the_slot_back(
    tiers: dict[str, pgk.ExecutionContext],
) -> None:
    gate = share_gate(1, *tiers.values())
    out = tiers["burstable"]
    device = pgk.runtime.get_or_initialize().device
    with context_session(out):
        tensor = torch.ones(MB, dtype=torch.uint8)
    out.evict()
    device.inject_fault(1, native.Device.Call.move)
    with pytest.raises(pgk.DeviceError), context_session(out):
        pass
    assert gate.open == 0
    with context_session(out):
        assert gate.open == 1
        assert tensor.eq(1).all()


# Processes ----------------------------------------------------------------------------------------

beside_threads = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@beside_threads
def test_a_forked_child_has_no_part_in_the_queue(one: pgk.ExecutionContext) -> None:
    session = context_session(one)

    def work() -> str:
        session.__exit__(None, None, None)
        assert pgk.runtime._runtime is not None
        with pytest.raises(pgk.ForkError), context_session(one):
            pass
        with pytest.raises(pgk.ForkError), context_session(one, timeout=0):
            pass
        return "done"

    with session:
        other = Occupant(one)
        wait_until(lambda: waiting(one) == 1)
        assert in_child(work) == "done"
        assert waiting(one) == 1
        assert not other.is_in
    other.enter()
    assert in_child(work) == "done"
    other.leave()
    assert is_free(one)


@beside_threads
def test_forking_while_other_threads_queue_up(scheduler: None) -> None:
    """No lock may be held in the child by a thread that does not exist there."""
    context = pgk.create_context("two", 8 * MB, max_sessions=2)
    stop = threading.Event()

    def work() -> int:
        turns = 0
        while not stop.is_set():
            with contextlib.suppress(SessionTimeoutError), context_session(context, timeout=0.001):
                turns += 1
        return turns

    threads = [background(work) for _ in range(4)]
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                try:
                    context_session(context).__enter__()
                except pgk.ForkError:
                    os._exit(0)
                os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
    assert sum(thread.result(PATIENCE) for thread in threads) > 0
    assert is_free(context)


def test_daemons_that_wait_at_the_end_of_the_interpreter() -> None:
    code = """
import asyncio, threading, time
import pygpukit_torch as pgk
pgk.initialize(device="cpu", total_vram=64 << 20)
context = pgk.create_context("a", 8 << 20, max_sessions=1)

def enter():
    with pgk.context_session(context):
        threading.Event().wait()

async def enter_async():
    async with pgk.context_session(context):
        await asyncio.sleep(1000)

for _ in range(3):
    threading.Thread(target=enter, daemon=True).start()
threading.Thread(target=lambda: asyncio.run(enter_async()), daemon=True).start()
while pgk.stats().contexts[0].waiting < 3:
    time.sleep(0.001)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# All together -------------------------------------------------------------------------------------


def test_many_threads_on_nested_gates(tiers: dict[str, pgk.ExecutionContext]) -> None:
    """Whoever is in one context of the partition may go on to others: it is in already."""
    contexts = list(tiers.values())
    own = pgk.create_context("own", 8 * MB, max_sessions=2)
    gate = share_gate(3, *contexts, own)
    inside = most = 0
    counting = threading.Lock()

    def count(change: int) -> None:
        nonlocal inside, most
        with counting:
            inside += change
            most = max(most, inside)

    def work(seed: int) -> int:
        rng = random.Random(seed)
        late = 0
        for _ in range(60):
            timeout = rng.choice([None, None, 0.0005, 0])
            try:
                with context_session(rng.choice([*contexts, own]), timeout=timeout):
                    count(1)
                    # From outside of `own` it has to wait there, which holds up only who wants it.
                    with context_session(rng.choice([*contexts, own])):
                        time.sleep(0.0003)
                    count(-1)
            except SessionTimeoutError:
                late += 1
        return late

    threads = [background(work, seed) for seed in range(12)]
    late = [thread.result(PATIENCE) for thread in threads]
    assert most == 3
    assert sum(late) > 0
    assert gate.open == gate.waiting == 0
    assert all(is_free(context) for context in [*contexts, own])
    assert all(context.state == "idle" for context in [*contexts, own])


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a bool": (True, TypeError, "max_sessions must be an int or None, got bool True"),
    "a float": (2.0, TypeError, r"got float 2\.0"),
    "a text": ("2", TypeError, "got str '2'"),
    "none at all": (0, ValueError, "max_sessions must be at least 1"),
    "fewer": (-1, ValueError, "got -1"),
    "absurdly many": (1 << 70, ValueError, "a sensible number"),
}


@pytest.mark.parametrize(("value", "error", "text"), WRONG.values(), ids=WRONG)
def test_wrong_limits(scheduler: None, value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pgk.create_context("a", 8 * MB, max_sessions=value)
    assert pgk.list_contexts() == []


@pytest.mark.parametrize(
    ("value", "error"),
    [("1", TypeError), (True, TypeError), (-1, ValueError), (float("nan"), ValueError)],
)
def test_wrong_timeouts(one: pgk.ExecutionContext, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout must be"):
        context_session(one, timeout=value)
