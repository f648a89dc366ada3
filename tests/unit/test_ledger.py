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
