"""The ledger against its definition, by random programs."""

import contextlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pygpukit_torch import AdmissionError, ContextBusyError, native

CAPACITY = 100
SIZES = st.integers(0, 120)


class LedgerMachine(RuleBasedStateMachine):
    """Every operation against a dictionary of (max, base, resident)."""

    accounts = Bundle("accounts")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = native.Ledger(CAPACITY)
        self.model: dict[int, list[int]] = {}

    def committed(self, without: int | None = None) -> int:
        return sum(max(b, r) for a, (_, b, r) in self.model.items() if a != without)

    @rule(target=accounts, maximum=SIZES, base=SIZES)
    def open(self, maximum: int, base: int) -> int:
        if base > maximum:
            with pytest.raises(ValueError, match="above max"):
                self.ledger.open(maximum, base)
            return 0
        if self.committed() + base > CAPACITY:
            with pytest.raises(AdmissionError, match="does not fit"):
                self.ledger.open(maximum, base)
            return 0
        account = self.ledger.open(maximum, base)
        self.model[account] = [maximum, base, 0]
        return account

    @rule(account=accounts, amount=SIZES)
    def charge(self, account: int, amount: int) -> None:
        if account not in self.model:
            return
        maximum, base, resident = self.model[account]
        after = resident + amount
        fits = after <= maximum and self.committed(account) + max(base, after) <= CAPACITY
        if fits:
            self.ledger.charge(account, amount)
            self.model[account][2] = after
        else:
            with pytest.raises(torch.OutOfMemoryError):
                self.ledger.charge(account, amount)

    @rule(account=accounts, amount=SIZES)
    def refund(self, account: int, amount: int) -> None:
        if account not in self.model:
            return
        if amount <= self.model[account][2]:
            self.ledger.refund(account, amount)
            self.model[account][2] -= amount
        else:
            with pytest.raises(ValueError, match="exceeds the held"):
                self.ledger.refund(account, amount)

    @rule(account=accounts, maximum=SIZES, base=SIZES)
    def resize(self, account: int, maximum: int, base: int) -> None:
        if account not in self.model:
            return
        resident = self.model[account][2]
        if base > maximum or resident > maximum:
            with pytest.raises(ValueError, match="max"):
                self.ledger.resize(account, maximum, base)
        elif self.committed(account) + max(base, resident) > CAPACITY:
            with pytest.raises(AdmissionError):
                self.ledger.resize(account, maximum, base)
        else:
            self.ledger.resize(account, maximum, base)
            self.model[account][:2] = [maximum, base]

    @rule(account=consumes(accounts))
    def close(self, account: int) -> None:
        if account not in self.model:
            with pytest.raises(ValueError, match="no account"):
                self.ledger.close(account)
        elif self.model[account][2]:
            with pytest.raises(ContextBusyError, match="still holds"):
                self.ledger.close(account)
        else:
            self.ledger.close(account)
            del self.model[account]

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.ledger.check_invariants()
        assert self.ledger.uncommitted == CAPACITY - self.committed()
        assert self.ledger.resident == sum(r for _, _, r in self.model.values())
        for account, (maximum, base, resident) in self.model.items():
            room = min(maximum - resident, CAPACITY - self.committed(account) - resident)
            assert self.ledger.room(account) == room
            # The promise of a base: it can be charged whatever the others did.
            assert room >= base - resident


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=500, stateful_step_count=30)


def test_nobody_can_take_what_is_reserved() -> None:
    ledger = native.Ledger(100)
    reserved, other = ledger.open(60, 60), ledger.open(100, 0)
    ledger.charge(other, 40)
    with contextlib.suppress(torch.OutOfMemoryError):
        ledger.charge(other, 1)
        pytest.fail("a reservation was lent out")
    ledger.charge(reserved, 60)
    ledger.check_invariants()


TIERS = list(native.Tier.__members__.values())
HOST = 60


LIMITS = [CAPACITY, 45, 80]  # of the device, and of two partitions


class LendingMachine(RuleBasedStateMachine):
    """Tiers, loans, evictions, partitions: whatever happened, every base can be claimed."""

    accounts = Bundle("accounts")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = native.Ledger(CAPACITY, HOST)
        self.partitions = [0, *map(self.ledger.open_partition, LIMITS[1:])]
        self.tier: dict[int, int] = {}
        self.model: dict[int, list[int]] = {}  # max, base, resident, evicted
        self.place: dict[int, int] = {}  # which of LIMITS

    def committed(self, place: int, without: int = 0) -> int:
        return sum(
            max(base, resident)
            for account, (_, base, resident, _) in self.model.items()
            if account != without and place in (0, self.place[account])
        )

    @rule(
        target=accounts,
        maximum=SIZES,
        share=st.integers(0, 4),
        tier=st.sampled_from(TIERS),
        place=st.integers(0, 2),
        page=st.integers(1, 3),
    )
    def open(self, maximum: int, share: int, tier: native.Tier, place: int, page: int) -> int:
        base = maximum * share // 4
        try:
            account = self.ledger.open(maximum, base, tier, self.partitions[place], page)
        except AdmissionError:
            assert any(self.committed(each) + base > LIMITS[each] for each in (0, place))
            return 0
        except ValueError:
            assert maximum > LIMITS[place]
            return 0
        self.model[account] = [maximum, base, 0, 0]
        self.tier[account] = tier.value
        self.place[account] = place
        return account

    @rule(account=accounts, place=st.integers(0, 2))
    def assign(self, account: int, place: int) -> None:
        if account not in self.model or place == self.place[account]:
            return
        maximum, base, resident, _ = self.model[account]
        try:
            self.ledger.assign(account, self.partitions[place])
        except AdmissionError:
            assert self.committed(place) + max(base, resident) > LIMITS[place]
        except ValueError:
            assert maximum > LIMITS[place]
        else:
            self.place[account] = place

    def attempt(self, account: int, amount: int, call: str, resident: int, evicted: int) -> None:
        if account not in self.model:
            return
        try:
            getattr(self.ledger, call)(account, amount)
        except (torch.OutOfMemoryError, ValueError):
            return
        self.model[account][2] += resident * amount
        self.model[account][3] += evicted * amount

    @rule(account=accounts, amount=SIZES)
    def charge(self, account: int, amount: int) -> None:
        self.attempt(account, amount, "charge", 1, 0)

    @rule(account=accounts, amount=SIZES)
    def refund(self, account: int, amount: int) -> None:
        self.attempt(account, amount, "refund", -1, 0)

    @rule(account=accounts, amount=SIZES)
    def evict(self, account: int, amount: int) -> None:
        # As the manager does: what is lent must still find its place, unless it is that.
        if account in self.model and amount <= self.ledger.evictable(of_loans=False):
            self.attempt(account, amount, "evict", -1, 1)

    @rule(account=accounts, amount=SIZES)
    def restore(self, account: int, amount: int) -> None:
        self.attempt(account, amount, "restore", 1, -1)

    @rule(account=accounts)
    def claim(self, account: int) -> None:
        """The whole base, with lower tiers evicted: that must always do."""
        if account not in self.model:
            return
        _, base, resident, evicted = self.model[account]
        missing = base - resident - evicted
        lower = [other for other in self.model if self.tier[other] < self.tier[account]]
        mates = [other for other in lower if self.place[other] == self.place[account]]
        for others, shortage in (
            (mates, self.ledger.shortage_in_partition),
            (lower, self.ledger.shortage),
        ):
            for other in sorted(others, key=lambda other: self.tier[other]):
                short = shortage(account, missing) if missing > 0 else 0
                spare = min(self.ledger.spare(other, account), short)
                if spare:
                    assert spare <= self.ledger.evictable(of_loans=True)
                    self.ledger.evict(other, spare)
                    self.model[other][2] -= spare
                    self.model[other][3] += spare
        if missing > 0:
            self.ledger.charge(account, missing)
            self.model[account][2] += missing

    @invariant()
    def books_are_right(self) -> None:
        self.ledger.check_invariants()
        residents = [resident for _, _, resident, _ in self.model.values()]
        assert sum(residents) == self.ledger.resident <= CAPACITY
        assert sum(evicted for *_, evicted in self.model.values()) == self.ledger.evicted <= HOST
        for maximum, _, resident, evicted in self.model.values():
            assert resident + evicted <= maximum
        for place, limit in enumerate(LIMITS):
            held = [self.model[a][2] for a in self.model if place in (0, self.place[a])]
            assert sum(held) <= limit


TestLending = LendingMachine.TestCase
TestLending.settings = settings(max_examples=500, stateful_step_count=30)


def test_unused_bases_are_lent_to_lower_tiers_only() -> None:
    tiers = native.Tier
    ledger = native.Ledger(100, 100)
    ledger.open(60, 60, tiers.guaranteed)
    middle = ledger.open(100, 20, tiers.burstable)
    low = ledger.open(100, 0, tiers.best_effort)
    assert ledger.room(low) == 100
    assert ledger.room(middle) == 100
    other = ledger.open(100, 0, tiers.burstable)
    assert ledger.room(other) == 80, "a base of the same tier was lent"


def test_nothing_is_lent_that_could_not_be_evicted() -> None:
    ledger = native.Ledger(100, 10)
    ledger.open(60, 60, native.Tier.guaranteed)
    low = ledger.open(100, 0, native.Tier.best_effort)
    assert ledger.room(low) == 50


def test_a_partition_is_a_limit_that_its_accounts_share() -> None:
    ledger = native.Ledger(100, 100)
    partition = ledger.open_partition(40)
    with pytest.raises(ValueError, match=r"max 41 B is above the 40 B of its partition"):
        ledger.open(41, 0, native.Tier.burstable, partition)
    first = ledger.open(40, 30, native.Tier.guaranteed, partition)
    with pytest.raises(AdmissionError, match=r"10 B of the partition's 40 B"):
        ledger.open(20, 11, native.Tier.guaranteed, partition)
    second = ledger.open(40, 0, native.Tier.best_effort, partition)
    assert ledger.room(second) == 40, "an unused base is lent within the partition, too"
    ledger.charge(second, 40)
    assert ledger.room(first) == 0
    assert ledger.shortage_in_partition(first, 30) == 30
    assert ledger.shortage(first, 30) == 0
    with pytest.raises(ContextBusyError, match="has accounts"):
        ledger.close_partition(partition)
    ledger.assign(second, 0)
    assert ledger.room(first) == 40
    with pytest.raises(AdmissionError):
        ledger.assign(second, partition)
    ledger.check_invariants()
