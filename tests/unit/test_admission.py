"""Admission: the decisions, the order of those who wait, and the books under random programs."""

import pickle
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pygpukit_torch import AdmissionError, native
from pygpukit_torch.native import QosEvaluation, QosPolicyEvaluator, QosTaskMeta, Tier

MB = 1 << 20
UNIT = 10**9  # shares are kept in billionths


@pytest.fixture
def evaluator() -> QosPolicyEvaluator:
    """64 MiB and all of the bandwidth."""
    return QosPolicyEvaluator(64 * MB)


def guaranteed(id: str, memory: int, bandwidth: float = 0.0) -> QosTaskMeta:
    return QosTaskMeta.guaranteed(id, id.upper(), memory, bandwidth_request=bandwidth)


def burstable(id: str, memory: int, ratio: float = 1.0, bandwidth: float = 0.0) -> QosTaskMeta:
    return QosTaskMeta.burstable(id, id.upper(), memory, ratio, bandwidth_request=bandwidth)


def best_effort(id: str) -> QosTaskMeta:
    return QosTaskMeta.best_effort(id, id.upper())


def take(evaluator: QosPolicyEvaluator, *tasks: QosTaskMeta) -> list[str]:
    """Evaluate and reserve one after the other; returns the decisions."""
    decisions = []
    for task in tasks:
        evaluation = evaluator.evaluate(task)
        evaluator.reserve(evaluation)
        decisions.append(str(evaluation.decision))
    return decisions


def figures(evaluator: QosPolicyEvaluator) -> dict[str, float]:
    stats = evaluator.stats()
    return {name: getattr(stats, name) for name in dir(stats) if not name.startswith("_")}


def ids(evaluations: list[QosEvaluation]) -> list[str]:
    return [evaluation.task_id for evaluation in evaluations]


# Tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "tier", "memory", "ratio", "bandwidth"),
    [
        (guaranteed("a", 100, 0.25), Tier.guaranteed, (100, 100), 1.0, 0.25),
        (guaranteed("a", 100), Tier.guaranteed, (100, 100), 1.0, 0.0),
        (burstable("a", 100, 2.5, 1), Tier.burstable, (100, 250), 2.5, 1.0),
        (burstable("a", 3, 1.5), Tier.burstable, (3, 4), 1.5, 0.0),
        # A double has fewer digits than a size.
        (burstable("a", 2**60 + 1, 1), Tier.burstable, (2**60 + 1, 2**60 + 1), 1.0, 0.0),
        (burstable("a", 2**60, 1e300), Tier.burstable, (2**60, 2**64 - 1), 1e300, 0.0),
        (best_effort("a"), Tier.best_effort, (0, 2**64 - 1), 1.0, 0.0),
    ],
)
def test_a_task_says_what_it_asks_for(
    task: QosTaskMeta, tier: Tier, memory: tuple[int, int], ratio: float, bandwidth: float
) -> None:
    assert (task.id, task.name, task.qos_class) == ("a", "A", tier)
    assert (task.memory_request, task.memory_limit) == memory
    assert (task.burst_ratio, task.bandwidth_request) == (ratio, bandwidth)


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no id": (lambda: guaranteed("", 1), ValueError, "a task needs an id"),
    "no id for best effort": (lambda: best_effort(""), ValueError, "a task needs an id"),
    "zero memory": (lambda: guaranteed("a", 0), ValueError, "memory must be positive, got 0"),
    "negative memory": (lambda: guaranteed("a", -5), ValueError, "memory must be positive, got -5"),
    "zero request": (lambda: burstable("a", 0), ValueError, "memory_request must be positive"),
    "float memory": (
        lambda: guaranteed("a", 1.5),  # type: ignore[arg-type]
        TypeError,
        "memory must be an int, got float",
    ),
    "bool memory": (lambda: burstable("a", True), TypeError, "memory_request must be an int"),
    "ratio below 1": (lambda: burstable("a", 1, 0.99), ValueError, "at least 1, got 0.99"),
    "negative ratio": (lambda: burstable("a", 1, -2), ValueError, "at least 1, got -2"),
    "ratio nan": (lambda: burstable("a", 1, float("nan")), ValueError, "burst_ratio .* got nan"),
    "ratio inf": (lambda: burstable("a", 1, float("inf")), ValueError, "burst_ratio .* got inf"),
    "ratio beyond doubles": (lambda: burstable("a", 1, 10**400), ValueError, "finite .* got inf"),
    "ratio bool": (lambda: burstable("a", 1, True), TypeError, "int or a float, got bool"),
    "ratio str": (
        lambda: burstable("a", 1, "2"),  # type: ignore[arg-type]
        TypeError,
        "burst_ratio must be an int or a float, got str",
    ),
    "negative bandwidth": (
        lambda: guaranteed("a", 1, -0.1),
        ValueError,
        "bandwidth_request must be between 0 and 1, got -0.1",
    ),
    "bandwidth above 1": (lambda: burstable("a", 1, 1, 1.01), ValueError, "and 1, got 1.01"),
    "bandwidth nan": (lambda: guaranteed("a", 1, float("nan")), ValueError, "got nan"),
    "bandwidth inf": (lambda: guaranteed("a", 1, float("inf")), ValueError, "got inf"),
    "bandwidth -inf": (lambda: guaranteed("a", 1, -(10**400)), ValueError, "got -inf"),
    "bandwidth None": (
        lambda: guaranteed("a", 1, None),  # type: ignore[arg-type]
        TypeError,
        "bandwidth_request must be an int or a float, got NoneType",
    ),
    "bandwidth of best effort": (
        lambda: QosTaskMeta.best_effort("a", "A", bandwidth_request=0.5),  # type: ignore[call-arg]
        TypeError,
        "best_effort",
    ),
    "no total": (lambda: QosPolicyEvaluator(0), ValueError, "total_memory must be positive"),
    "negative total": (lambda: QosPolicyEvaluator(-1), ValueError, "total_memory must be positive"),
    "total beyond sizes": (lambda: QosPolicyEvaluator(2**64), ValueError, "total_memory .* below"),
    "total float": (
        lambda: QosPolicyEvaluator(1e9),  # type: ignore[arg-type]
        TypeError,
        "total_memory must be an int, got float",
    ),
    "no bandwidth": (lambda: QosPolicyEvaluator(1, 0), ValueError, "total_bandwidth must be pos"),
    "negative total bandwidth": (lambda: QosPolicyEvaluator(1, -1), ValueError, "total_bandwidth"),
    "total bandwidth above 1": (lambda: QosPolicyEvaluator(1, 2), ValueError, "between 0 and 1"),
    "total bandwidth nan": (lambda: QosPolicyEvaluator(1, float("nan")), ValueError, "got nan"),
    "evaluate None": (
        lambda: QosPolicyEvaluator(1).evaluate(None),  # type: ignore[arg-type]
        TypeError,
        "QosTaskMeta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_with_a_text(case: str) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


# Decisions ---------------------------------------------------------------------------------------


def test_a_decision_is_equal_to_its_name(evaluator: QosPolicyEvaluator) -> None:
    decision = evaluator.evaluate(guaranteed("a", MB)).decision
    assert decision is native.QosDecision.admit
    assert decision == "admit"
    assert f"{decision}" == "admit"
    assert list(native.QosDecision) == ["admit", "throttle", "queue", "reject"]
    assert pickle.loads(pickle.dumps(decision)) is decision


def test_an_admitted_task_reserves_its_requests(evaluator: QosPolicyEvaluator) -> None:
    for task, priority in [
        (guaranteed("g", 8 * MB, 0.25), 100),
        (burstable("b", 4 * MB, 3, 0.5), 50),
        (best_effort("e"), 0),
    ]:
        evaluation = evaluator.evaluate(task)
        assert evaluation.admitted
        assert (evaluation.decision, evaluation.reason) == ("admit", "")
        assert (evaluation.task_id, evaluation.qos_class) == (task.id, task.qos_class)
        assert evaluation.priority == priority
        assert evaluation.reserved_memory == task.memory_request
        assert evaluation.reserved_bandwidth == task.bandwidth_request
        evaluator.reserve(evaluation)
    assert figures(evaluator) == {
        "total_memory": 64 * MB,
        "total_bandwidth": 1.0,
        "guaranteed_memory": 8 * MB,
        "guaranteed_bandwidth": 0.25,
        "burstable_memory": 4 * MB,
        "burstable_bandwidth": 0.5,
        "available_memory": 52 * MB,
        "available_bandwidth": 0.25,
        "admitted": 3,
        "queued": 0,
        "best_effort_queue": 0,
    }


def test_a_guaranteed_task_without_a_bandwidth_reserves_none(evaluator: QosPolicyEvaluator) -> None:
    assert take(evaluator, *(guaranteed(f"g{n}", 16 * MB) for n in range(4))) == ["admit"] * 4
    assert evaluator.stats().guaranteed_bandwidth == 0
    assert evaluator.stats().available_bandwidth == 1
    assert evaluator.stats().available_memory == 0


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (
            guaranteed("a", 80 * MB),
            "a reservation of 80.00 MiB does not fit: the device has 64.00 MiB in all",
        ),
        (
            burstable("a", 65 * MB, 2),
            "a reservation of 65.00 MiB does not fit: the device has 64.00 MiB in all",
        ),
        (guaranteed("a", 1 << 80), "a reservation of .* does not fit: the device has 64.00 MiB"),
        (guaranteed("a", MB, 0.75), "a bandwidth of 0.75 does not fit: the device has 0.5 in all"),
        (burstable("a", MB, 1, 1), "a bandwidth of 1 does not fit: the device has 0.5 in all"),
    ],
)
def test_what_asks_for_more_than_there_is_in_all_is_rejected(
    task: QosTaskMeta, reason: str
) -> None:
    evaluator = QosPolicyEvaluator(64 * MB, 0.5)
    take(evaluator, guaranteed("full", 64 * MB, 0.5), burstable("waits", MB))
    evaluation = evaluator.evaluate(task)
    assert not evaluation.admitted
    assert evaluation.decision == "reject"
    assert re.fullmatch(reason + ".*", evaluation.reason)
    assert (evaluation.reserved_memory, evaluation.reserved_bandwidth) == (0, 0)
    before = figures(evaluator)
    with pytest.raises(ValueError, match=r"task 'a' was rejected: .* does not fit"):
        evaluator.reserve(evaluation)
    assert figures(evaluator) == before


@pytest.mark.parametrize(
    ("there", "task", "reason"),
    [
        (
            guaranteed("g", 40 * MB),
            guaranteed("a", 30 * MB),
            "a reservation of 30.00 MiB does not fit: 24.00 MiB of the device's 64.00 MiB are "
            "neither reserved nor in use",
        ),
        (burstable("g", 40 * MB, 1.5), burstable("a", 30 * MB), "a reservation of 30.00 MiB does"),
        (
            burstable("g", MB, 1, 0.7),
            guaranteed("a", MB, 0.5),
            "a bandwidth of 0.5 does not fit: 0.3 of the device's 1 are not reserved",
        ),
        (
            guaranteed("g", MB, 1),
            burstable("a", MB, 1, 0.5),
            "a bandwidth of 0.5 does not fit: 0 of the device's 1 are not reserved",
        ),
        (guaranteed("g", 64 * MB), best_effort("a"), "all memory is reserved or in use"),
        (guaranteed("g", MB, 1), best_effort("a"), "all bandwidth is reserved"),
    ],
)
def test_what_does_not_fit_now_waits(
    evaluator: QosPolicyEvaluator, there: QosTaskMeta, task: QosTaskMeta, reason: str
) -> None:
    take(evaluator, there)
    evaluation = evaluator.evaluate(task)
    assert not evaluation.admitted
    assert evaluation.decision == "queue"
    assert evaluation.reason.startswith(reason)
    assert (evaluation.reserved_memory, evaluation.reserved_bandwidth) == (0, 0)
    free = evaluator.stats().available_memory
    evaluator.reserve(evaluation)
    stats = evaluator.stats()
    assert (stats.admitted, stats.queued, stats.available_memory) == (1, 1, free)
    assert stats.best_effort_queue == (task.qos_class == Tier.best_effort)
    (admitted,) = evaluator.release("g")
    assert (admitted.task_id, admitted.decision) == ("a", "admit")
    assert (evaluator.stats().admitted, evaluator.stats().queued) == (1, 0)


def test_a_burstable_task_whose_limit_is_not_free_is_throttled(
    evaluator: QosPolicyEvaluator,
) -> None:
    take(evaluator, guaranteed("g", 34 * MB))
    evaluation = evaluator.evaluate(burstable("b", 20 * MB, 2))
    assert evaluation.admitted
    assert evaluation.decision == "throttle"
    assert evaluation.reason == (
        "of its limit of 40.00 MiB only 30.00 MiB are neither reserved nor in use"
    )
    assert evaluation.reserved_memory == 20 * MB, "what is beyond the request is reserved by nobody"
    evaluator.reserve(evaluation)
    assert evaluator.stats().burstable_memory == 20 * MB
    assert evaluator.stats().available_memory == 10 * MB
    assert take(evaluator, guaranteed("h", 10 * MB)) == ["admit"]


def test_a_throttled_task_reserves_the_bandwidth_it_gets(evaluator: QosPolicyEvaluator) -> None:
    take(evaluator, guaranteed("g", MB, 0.7))
    evaluation = evaluator.evaluate(burstable("b", MB, 1, 0.5))
    assert evaluation.decision == "throttle"
    assert evaluation.reason == "of its bandwidth of 0.5 it gets the 0.3 that are not reserved"
    assert evaluation.reserved_bandwidth == 0.3
    evaluator.reserve(evaluation)
    assert evaluator.stats().burstable_bandwidth == 0.3
    assert evaluator.stats().available_bandwidth == 0
    evaluator.release("g")
    assert evaluator.stats().burstable_bandwidth == 0.3, "what it got stays the same"
    evaluator.release("b")
    assert evaluator.stats().available_bandwidth == 1


def test_evaluating_changes_nothing(evaluator: QosPolicyEvaluator) -> None:
    take(evaluator, guaranteed("g", 60 * MB, 0.5), burstable("b", 8 * MB))
    before = figures(evaluator)
    for task in (guaranteed("g", MB), burstable("b", MB, 2, 1), best_effort("e")):
        first, second = evaluator.evaluate(task), evaluator.evaluate(task)
        assert (first.decision, first.reason) == (second.decision, second.reason)
    assert figures(evaluator) == before


# Reserving and releasing -------------------------------------------------------------------------


def test_an_id_is_taken_while_its_task_is_reserved_or_waits(evaluator: QosPolicyEvaluator) -> None:
    evaluation = evaluator.evaluate(guaranteed("a", 40 * MB))
    evaluator.reserve(evaluation)
    take(evaluator, burstable("b", 40 * MB))
    before = figures(evaluator)
    with pytest.raises(ValueError, match="task 'a' is reserved already"):
        evaluator.reserve(evaluation)
    with pytest.raises(ValueError, match="task 'b' is queued already"):
        take(evaluator, guaranteed("b", MB))
    assert figures(evaluator) == before
    evaluator.release("b")
    assert take(evaluator, guaranteed("b", MB)) == ["admit"]


def test_an_unknown_task_cannot_be_released(evaluator: QosPolicyEvaluator) -> None:
    take(evaluator, guaranteed("a", MB))
    evaluator.release("a")
    for unknown in ("a", "b", ""):
        with pytest.raises(ValueError, match=f"no task '{unknown}' is reserved or queued"):
            evaluator.release(unknown)


def test_an_evaluation_that_no_longer_holds_is_refused(evaluator: QosPolicyEvaluator) -> None:
    first = evaluator.evaluate(guaranteed("first", 40 * MB))
    second = evaluator.evaluate(guaranteed("second", 40 * MB))
    evaluator.reserve(first)
    with pytest.raises(
        AdmissionError,
        match=r"task 'second' must be evaluated again: the decision was admit and is now queue "
        r"\(a reservation of 40\.00 MiB does not fit: 24\.00 MiB of",
    ):
        evaluator.reserve(second)
    assert (evaluator.stats().admitted, evaluator.stats().queued) == (1, 0)
    assert evaluator.stats().available_memory == 24 * MB


def test_a_bandwidth_that_is_no_longer_there_is_refused(evaluator: QosPolicyEvaluator) -> None:
    evaluation = evaluator.evaluate(burstable("b", MB, 1, 0.5))
    take(evaluator, guaranteed("g", MB, 0.7))
    with pytest.raises(AdmissionError, match="was admit and is now throttle"):
        evaluator.reserve(evaluation)
    assert evaluator.stats().burstable_bandwidth == 0
    throttled = evaluator.evaluate(burstable("b", MB, 1, 0.5))
    evaluator.release("g")
    evaluator.reserve(throttled)
    assert evaluator.stats().burstable_bandwidth == 0.3, "more than was evaluated"


def test_nobody_waits_who_need_not(evaluator: QosPolicyEvaluator) -> None:
    """Else he would wait for a release that may never come."""
    take(evaluator, guaranteed("g", 64 * MB))
    evaluation = evaluator.evaluate(guaranteed("late", MB))
    assert evaluator.release("g") == []
    with pytest.raises(AdmissionError, match="was queue and is now admit"):
        evaluator.reserve(evaluation)
    assert evaluator.stats().queued == 0


def test_a_reservation_made_before_others_waited_does_not_go_ahead_of_them(
    evaluator: QosPolicyEvaluator,
) -> None:
    early = evaluator.evaluate(burstable("early", MB))
    take(evaluator, guaranteed("g", 60 * MB), guaranteed("waits", 8 * MB))
    with pytest.raises(AdmissionError, match=r"is now queue \(1 waiting task"):
        evaluator.reserve(early)


def test_an_evaluation_of_another_evaluator_does_not_break_the_totals(
    evaluator: QosPolicyEvaluator,
) -> None:
    foreign = QosPolicyEvaluator(1024 * MB).evaluate(guaranteed("a", 512 * MB))
    with pytest.raises(AdmissionError, match="is now reject"):
        evaluator.reserve(foreign)
    assert evaluator.stats().available_memory == 64 * MB


def test_reset_forgets_all(evaluator: QosPolicyEvaluator) -> None:
    new = figures(evaluator)
    take(evaluator, guaranteed("g", 64 * MB, 0.5), burstable("b", MB), best_effort("e"))
    evaluator.reset()
    assert figures(evaluator) == new
    assert take(evaluator, guaranteed("g", 64 * MB), best_effort("e")) == ["admit", "queue"]


# Who waits ---------------------------------------------------------------------------------------


def test_those_who_wait_are_admitted_by_priority_then_first_come(
    evaluator: QosPolicyEvaluator,
) -> None:
    take(evaluator, guaranteed("full", 64 * MB))
    waiting = [
        best_effort("e1"),
        burstable("b1", MB),
        best_effort("e2"),
        guaranteed("g1", MB),
        burstable("b2", MB),
        guaranteed("g2", MB),
    ]
    assert take(evaluator, *waiting) == ["queue"] * 6
    assert (evaluator.stats().queued, evaluator.stats().best_effort_queue) == (6, 2)
    admitted = evaluator.release("full")
    assert ids(admitted) == ["g1", "g2", "b1", "b2", "e1", "e2"]
    assert all(evaluation.admitted for evaluation in admitted)
    assert (evaluator.stats().admitted, evaluator.stats().queued) == (6, 0)


def test_small_tasks_never_keep_a_large_one_waiting(evaluator: QosPolicyEvaluator) -> None:
    take(
        evaluator, guaranteed("g1", 30 * MB), guaranteed("g2", 30 * MB), guaranteed("big", 40 * MB)
    )
    for task in (guaranteed("small", MB), burstable("lower", MB), best_effort("lowest")):
        evaluation = evaluator.evaluate(task)
        assert evaluation.decision == "queue"
        evaluator.reserve(evaluation)
    assert evaluation.reason == "3 waiting task(s) of the same or a higher priority go first"
    assert ids(evaluator.release("g1")) == []
    assert ids(evaluator.release("g2")) == ["big", "small", "lower", "lowest"]


def test_a_newcomer_goes_ahead_of_lower_priorities(evaluator: QosPolicyEvaluator) -> None:
    take(evaluator, guaranteed("g", 40 * MB), burstable("waits", 30 * MB), best_effort("last"))
    assert take(evaluator, guaranteed("newcomer", 20 * MB)) == ["admit"]
    assert ids(evaluator.release("g")) == ["waits", "last"]


def test_taking_a_task_out_of_the_queue_lets_those_behind_it_in(
    evaluator: QosPolicyEvaluator,
) -> None:
    take(evaluator, guaranteed("g", 40 * MB), guaranteed("big", 40 * MB), burstable("b", 8 * MB))
    (admitted,) = evaluator.release("big")
    assert (admitted.task_id, admitted.reserved_memory) == ("b", 8 * MB)
    assert (evaluator.stats().admitted, evaluator.stats().queued) == (2, 0)


def test_who_is_admitted_from_the_queue_may_be_throttled(evaluator: QosPolicyEvaluator) -> None:
    take(evaluator, guaranteed("g", MB, 0.75), guaranteed("h", MB, 0.25), burstable("b", MB, 1, 1))
    (admitted,) = evaluator.release("h")
    assert (admitted.decision, admitted.reserved_bandwidth) == ("throttle", 0.25)
    assert evaluator.stats().available_bandwidth == 0


def test_threads_that_wait_are_all_admitted() -> None:
    evaluator = QosPolicyEvaluator(10, 0.5)
    started = {f"{thread}.{turn}": threading.Event() for thread in range(4) for turn in range(100)}
    together = threading.Barrier(4)
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            together.wait(60)
            for turn in range(100):
                id = f"{thread}.{turn}"
                make = (guaranteed, burstable)[turn % 2]
                task = make(id, 3 + turn % 5) if turn % 5 else best_effort(id)
                while True:
                    evaluation = evaluator.evaluate(task)
                    time.sleep(1e-5)  # others come in between
                    try:
                        evaluator.reserve(evaluation)
                        break
                    except AdmissionError:
                        continue
                assert evaluation.admitted or started[id].wait(60), "left in the queue"
                time.sleep(1e-5)
                stats = evaluator.stats()
                assert stats.guaranteed_memory + stats.burstable_memory <= 10
                for other in evaluator.release(id):
                    started[other.task_id].set()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    assert figures(evaluator) == figures(QosPolicyEvaluator(10, 0.5))


# Bandwidth ---------------------------------------------------------------------------------------


@given(st.integers(1, 300))
def test_n_times_an_nth_of_the_bandwidth_fits(n: int) -> None:
    evaluator = QosPolicyEvaluator(1000)
    assert take(evaluator, *(guaranteed(str(k), 1, 1 / n) for k in range(n))) == ["admit"] * n
    assert evaluator.stats().available_bandwidth * UNIT == pytest.approx(UNIT % n, abs=0.01)


@given(st.integers(0, UNIT))
def test_billionths_are_exact(n: int) -> None:
    assert guaranteed("a", 1, n / UNIT).bandwidth_request == n / UNIT


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.data())
def test_bandwidth_never_drifts(bandwidths: list[float], data: st.DataObject) -> None:
    evaluator = QosPolicyEvaluator(1000)
    got: dict[str, float] = {}
    for number, bandwidth in enumerate(bandwidths):
        evaluation = evaluator.evaluate(burstable(str(number), 1, 1, bandwidth))
        if evaluation.admitted:
            evaluator.reserve(evaluation)
            got[evaluation.task_id] = evaluation.reserved_bandwidth
    assert sum(round(bandwidth * UNIT) for bandwidth in got.values()) <= UNIT
    for id in data.draw(st.permutations(list(got))):
        evaluator.release(id)
    assert evaluator.stats().available_bandwidth == 1.0
    assert evaluator.stats().burstable_bandwidth == 0.0


# Contexts ----------------------------------------------------------------------------------------


@given(
    st.integers(1, 99),
    st.integers(1, 150),
    st.integers(0, 50),
    st.sampled_from([Tier.burstable, Tier.guaranteed]),
)
def test_contexts_are_admitted_by_the_same_rule(
    reserved: int, base: int, beyond: int, tier: Tier
) -> None:
    evaluator, ledger = QosPolicyEvaluator(100), native.Ledger(100)
    take(evaluator, guaranteed("there", reserved))
    ledger.open(reserved, reserved, Tier.guaranteed)
    if tier == Tier.guaranteed:
        evaluation = evaluator.evaluate(guaranteed("a", base))
        maximum = base
    else:
        evaluation = evaluator.evaluate(burstable("a", base, 1 + beyond / base))
        maximum = base + beyond
    other = ledger.open(maximum, 0, tier)
    if evaluation.admitted:
        ledger.resize(other, maximum, base)
        ledger.resize(other, maximum, 0)
        ledger.open(maximum, base, tier)
    else:
        for attempt in (
            lambda: ledger.open(maximum, base, tier),
            lambda: ledger.resize(other, maximum, base),
        ):
            with pytest.raises(AdmissionError, match=f"^{re.escape(evaluation.reason)}$"):
                attempt()


@pytest.mark.parametrize("tier", [Tier.best_effort, Tier.burstable])
def test_a_context_that_reserves_nothing_need_not_wait(tier: Tier) -> None:
    ledger = native.Ledger(100)
    ledger.open(100, 100, Tier.guaranteed)
    assert ledger.room(ledger.open(100, 0, tier)) == 0


# Random programs ---------------------------------------------------------------------------------

MEMORY = 20
BANDWIDTH = UNIT // 2
PRIORITIES = {Tier.guaranteed: 100, Tier.burstable: 50, Tier.best_effort: 0}


@dataclass(frozen=True)
class Wish:
    """A task as the model knows it; bandwidths in billionths."""

    id: str
    tier: Tier
    memory: int
    limit: int
    bandwidth: int

    @property
    def priority(self) -> int:
        return PRIORITIES[self.tier]

    def meta(self) -> QosTaskMeta:
        if self.tier == Tier.guaranteed:
            return guaranteed(self.id, self.memory, self.bandwidth / UNIT)
        if self.tier == Tier.burstable:
            ratio = self.limit / self.memory
            return burstable(self.id, self.memory, ratio, self.bandwidth / UNIT)
        return best_effort(self.id)


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    id = draw(st.sampled_from("abcdefgh"))
    tier = draw(st.sampled_from(list(PRIORITIES)))
    if tier == Tier.best_effort:
        return Wish(id, tier, 0, 0, 0)
    memory = draw(st.integers(1, MEMORY + 2))
    limit = memory * draw(st.integers(1, 3)) if tier == Tier.burstable else memory
    tenths = st.integers(0, 6).map(lambda n: n * UNIT // 10)
    bandwidth = draw(st.one_of(st.just(0), tenths, st.integers(0, BANDWIDTH)))
    return Wish(id, tier, memory, limit, bandwidth)


class AdmissionMachine(RuleBasedStateMachine):
    """Every operation beside lists of who is in and who waits; evaluations may be old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluator = QosPolicyEvaluator(MEMORY, BANDWIDTH / UNIT)
        self.admitted: dict[str, tuple[Wish, int]] = {}  # and the bandwidth it got
        self.queue: list[Wish] = []
        self.evaluations: list[tuple[Wish, QosEvaluation]] = []

    # The model ------------------------------------------------------------------------------------

    @property
    def free(self) -> tuple[int, int]:
        memory = sum(wish.memory for wish, _ in self.admitted.values())
        return MEMORY - memory, BANDWIDTH - sum(got for _, got in self.admitted.values())

    def judge(self, wish: Wish, waits: bool = False) -> tuple[str, int]:
        """The decision and the bandwidth; ``waits`` is for the first one in the queue."""
        memory, bandwidth = self.free
        if wish.memory > MEMORY or wish.bandwidth > BANDWIDTH:
            return "reject", 0
        if not waits and any(other.priority >= wish.priority for other in self.queue):
            return "queue", 0
        if wish.tier == Tier.best_effort:
            return ("admit" if memory and bandwidth else "queue"), 0
        if wish.memory > memory:
            return "queue", 0
        if wish.bandwidth <= bandwidth:
            return ("admit" if wish.limit <= memory else "throttle"), wish.bandwidth
        if wish.tier == Tier.burstable and bandwidth:
            return "throttle", bandwidth
        return "queue", 0

    def settle(self) -> list[tuple[str, str, int]]:
        """Admit from the queue; who, how and with which bandwidth."""
        result = []
        while self.queue:
            # The first of the highest priority: max() prefers those that came before.
            first = max(self.queue, key=lambda wish: wish.priority)
            decision, got = self.judge(first, waits=True)
            if decision == "queue":
                break
            self.queue.remove(first)
            self.admitted[first.id] = (first, got)
            result.append((first.id, decision, got))
        return result

    def check(self, wish: Wish, evaluation: QosEvaluation, decision: str, got: int) -> None:
        assert evaluation.decision == decision
        assert evaluation.admitted == (decision in ("admit", "throttle"))
        assert (evaluation.reason == "") == (decision == "admit")
        assert (evaluation.task_id, evaluation.qos_class) == (wish.id, wish.tier)
        assert evaluation.priority == wish.priority
        assert evaluation.reserved_memory == (wish.memory if evaluation.admitted else 0)
        assert evaluation.reserved_bandwidth == got / UNIT

    # The steps ------------------------------------------------------------------------------------

    @rule(wish=wishes(), reserve=st.booleans())
    def evaluate(self, wish: Wish, reserve: bool) -> None:
        before = figures(self.evaluator)
        evaluation = self.evaluator.evaluate(wish.meta())
        self.check(wish, evaluation, *self.judge(wish))
        assert figures(self.evaluator) == before
        self.evaluations.append((wish, evaluation))
        if reserve:
            self.reserve_one(wish, evaluation)

    @precondition(lambda self: self.evaluations)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.evaluations) - 1), label="evaluation")
        self.reserve_one(*self.evaluations[position])

    def reserve_one(self, wish: Wish, evaluation: QosEvaluation) -> None:
        before = figures(self.evaluator)
        decision, got = self.judge(wish)
        promised = round(evaluation.reserved_bandwidth * UNIT)
        error: type[Exception] | None = None
        if (
            evaluation.decision == "reject"
            or wish.id in self.admitted
            or any(wish.id == other.id for other in self.queue)
        ):
            error = ValueError
        elif evaluation.admitted:
            if decision not in ("admit", "throttle") or got < promised:
                error = AdmissionError
        elif decision != "queue":
            error = AdmissionError
        if error:
            with pytest.raises(error):
                self.evaluator.reserve(evaluation)
            assert figures(self.evaluator) == before
            return
        self.evaluator.reserve(evaluation)
        if evaluation.admitted:
            self.admitted[wish.id] = (wish, promised)
        else:
            self.queue.append(wish)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        known = [*self.admitted, *(wish.id for wish in self.queue)]
        id = data.draw(st.sampled_from([*known, "unknown"]), label="task")
        if id not in known:
            with pytest.raises(ValueError, match="no task 'unknown'"):
                self.evaluator.release(id)
            return
        waiting = {wish.id: wish for wish in self.queue if wish.id != id}
        released = self.evaluator.release(id)
        self.admitted.pop(id, None)
        self.queue = list(waiting.values())
        expected = self.settle()
        assert ids(released) == [id for id, _, _ in expected]
        for evaluation, (id, decision, got) in zip(released, expected, strict=True):
            self.check(waiting[id], evaluation, decision, got)

    @precondition(lambda self: len(self.evaluations) % 8 == 7)
    @rule()
    def reset(self) -> None:
        self.evaluator.reset()
        self.admitted, self.queue = {}, []

    @invariant()
    def books_are_right(self) -> None:
        memory, bandwidth = self.free
        assert memory >= 0
        assert bandwidth >= 0
        tiers = {tier: [0, 0] for tier in PRIORITIES}
        for wish, got in self.admitted.values():
            tiers[wish.tier][0] += wish.memory
            tiers[wish.tier][1] += got
        assert tiers[Tier.best_effort] == [0, 0]
        assert figures(self.evaluator) == {
            "total_memory": MEMORY,
            "total_bandwidth": 0.5,
            "guaranteed_memory": tiers[Tier.guaranteed][0],
            "guaranteed_bandwidth": tiers[Tier.guaranteed][1] / UNIT,
            "burstable_memory": tiers[Tier.burstable][0],
            "burstable_bandwidth": tiers[Tier.burstable][1] / UNIT,
            "available_memory": memory,
            "available_bandwidth": bandwidth / UNIT,
            "admitted": len(self.admitted),
            "queued": len(self.queue),
            "best_effort_queue": sum(wish.tier == Tier.best_effort for wish in self.queue),
        }

    @invariant()
    def nobody_waits_who_could_be_admitted(self) -> None:
        if self.queue:
            first = max(self.queue, key=lambda wish: wish.priority)
            assert self.judge(first, waits=True)[0] == "queue"


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=300, stateful_step_count=40)
