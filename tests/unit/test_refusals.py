"""Out of memory: what it says, and its facts."""

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import MB, QoSPolicy, context_session, create_context, refusal_of

pytestmark = pytest.mark.usefixtures("scheduler")


def refused(context: pgk.ExecutionContext, size: int) -> torch.OutOfMemoryError:
    with context_session(context), pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(size, dtype=torch.uint8)
    return caught.value


def test_handlers_that_look_for_the_words_find_them() -> None:
    text = str(refused(create_context("a", 4 * MB), 5 * MB))
    assert text.startswith("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    assert " out of memory." in text


# What it says ------------------------------------------------------------------------------------


@contextmanager
def at_work(name: str, size: int, qos: QoSPolicy) -> Iterator[None]:
    """An open session of a new context that holds so much."""
    with context_session(create_context(name, size, qos=qos)):
        kept = torch.ones(size, dtype=torch.uint8)
        yield
    assert kept.numel() == size


def test_it_says_what_helps_who_is_over_its_budget() -> None:
    context = create_context("a", 8 * MB)
    whole = str(refused(context, 9 * MB))
    assert "Reason: the request does not fit into its budget." in whole
    assert whole.endswith("It is more than the whole budget: raise that with resize().")
    with context_session(context):
        kept = torch.ones(6 * MB, dtype=torch.uint8)
    rest = str(refused(context, 3 * MB))
    assert "'a' (burstable) has 6.00 MiB of its budget of 8.00 MiB in use" in rest
    assert rest.endswith("Free tensors of the context, or raise its budget with resize().")
    assert kept[-1] == 1


def test_facts_are_those_of_the_text() -> None:
    context = create_context("a", 8 * MB, base_vram=2 * MB)
    with context_session(context):
        kept = torch.ones(6 * MB, dtype=torch.uint8)
    error = refused(context, 3 * MB)
    known = refusal_of(error)
    assert known is not None
    assert (known.context, known.qos) == ("a", QoSPolicy.BURSTABLE)
    assert (known.requested, known.used, known.budget) == (3 * MB, 6 * MB, 8 * MB)
    assert known.reason == "the request does not fit into its budget"
    (holder,) = known.holders
    assert (holder.name, holder.used, holder.reserved, holder.base) == ("a", 6 * MB, 6 * MB, 2 * MB)
    assert (holder.in_use, holder.pinned, holder.destroyed) == (True, False, False)
    assert known.others == 0
    assert kept[-1] == 1


def test_others_errors_have_none() -> None:
    assert refusal_of(ValueError("no")) is None
    assert (
        refusal_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")) is None
    )
    assert refusal_of(torch.OutOfMemoryError()) is None


def test_facts_are_found_from_copies_and_with_what_others_add() -> None:
    error = refused(create_context("a", 8 * MB), 9 * MB)
    first = refusal_of(error)
    assert first is not None
    assert refusal_of(copy.copy(error)) == refusal_of(pickle.loads(pickle.dumps(error))) == first
    assert refusal_of(RuntimeError(f"{error}\nException raised from ...")) == first


def test_each_thread_finds_its_own() -> None:
    contexts = [create_context(f"c{i}", (i + 2) * MB) for i in range(8)]
    wrong: list[object] = []

    def ask(i: int) -> None:
        for size in range(1, 20):
            known = refusal_of(refused(contexts[i], (i + 2 + size) * MB))
            if known is None or (known.context, known.requested) != (f"c{i}", (i + 2 + size) * MB):
                wrong.append(known)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_contexts_are_not_all_named() -> None:
    kept = []
    for i in range(30):
        with context_session(create_context(f"c{i}", 4 * MB)):
            kept.append(torch.ones((i + 1) * 64 * 1024, dtype=torch.uint8))
    error = refused(pgk.get_context("c0"), 5 * MB)
    known = refusal_of(error)
    assert known is not None
    assert len(known.holders) == 10
    assert known.others == 20
    reserved = [holder.reserved for holder in known.holders]
    assert reserved == sorted(reserved, reverse=True)
    assert f"and 20 more with {pgk.memory.format_bytes(20 * reserved[-1])}" in str(error)
    assert len(str(error)) < 1500


def test_it_says_for_whom_to_wait_and_who_is_of_a_higher_tier() -> None:
    best_effort, burstable = QoSPolicy.BEST_EFFORT, QoSPolicy.BURSTABLE
    with (
        at_work("worker", 60 * MB, best_effort),
        at_work("peer", 90 * MB, burstable),
        at_work("llm", 80 * MB, QoSPolicy.GUARANTEED),
    ):
        late = create_context("late", 64 * MB)
        text = str(refused(late, 32 * MB))
        assert "Reason: the device is full, and nobody can give way." in text
        assert text.endswith("Wait until sessions end that use peer, worker.")
        late.destroy()
        text = str(refused(create_context("late", 64 * MB, qos=best_effort), 32 * MB))
        assert text.endswith(
            "Wait until sessions end that use worker. "
            "The rest are of a higher tier and do not give way."
        )


def test_it_names_those_that_are_pinned() -> None:
    pinned = create_context("pinned", 250 * MB)
    with context_session(pinned):
        kept = torch.ones(240 * MB, dtype=torch.uint8)
    with pinned.pin():
        text = str(refused(create_context("late", 64 * MB), 32 * MB))
    assert "pinned 240.00 MiB (burstable, pinned)" in text
    assert text.endswith("Unpin pinned.")
    assert kept[-1] == 1


def test_a_context_that_cannot_come_back_says_so_in_the_same_words() -> None:
    sleeper = create_context("sleeper", 200 * MB)
    with context_session(sleeper):
        kept = torch.ones(200 * MB, dtype=torch.uint8)
    sleeper.evict()
    with (
        at_work("worker", 200 * MB, QoSPolicy.BURSTABLE),
        pytest.raises(torch.OutOfMemoryError) as caught,
        context_session(sleeper),
    ):
        pass
    text = str(caught.value)
    assert text.startswith("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    assert "Context 'sleeper' (burstable) cannot come back: 200.00 MiB of it is in host" in text
    known = refusal_of(caught.value)
    assert known is not None
    assert (known.context, known.requested) == ("sleeper", 200 * MB)
    assert kept[-1] == 1


def test_reserved_room_is_told_and_who_has_it() -> None:
    create_context("base", 240 * MB, base_vram=200 * MB)
    with at_work("low", 100 * MB, QoSPolicy.BEST_EFFORT):
        pgk.get_context("base").resize(250 * MB, 150 * MB)
        text = str(refused(create_context("late", 200 * MB), 160 * MB))
    assert "reserved for bases" in text
    assert "base 0 B (burstable, base 150.00 MiB)" in text
    assert text.endswith("Wait until sessions end that use low.")


def test_a_budget_of_no_whole_pages_is_named_as_what_is_full() -> None:
    context = create_context("a", 9 * MB)
    with context_session(context):
        kept = torch.ones(8 * MB, dtype=torch.uint8)
    text = str(refused(context, MB // 2))
    assert "Reason: the request does not fit into its budget." in text
    assert text.endswith("Free tensors of the context, or raise its budget with resize().")
    assert kept[-1] == 1


def test_a_handler_that_refuses_is_the_whole_reason() -> None:
    with context_session(create_context("big", 200 * MB)):
        kept = torch.ones(190 * MB, dtype=torch.uint8)
    handler = pgk.on_memory_pressure(lambda *_: False)
    try:
        with at_work("busy", 4 * MB, QoSPolicy.BURSTABLE):
            text = str(refused(create_context("late", 200 * MB), 180 * MB))
    finally:
        handler.remove()
    assert "a memory pressure handler refused to have others evicted" in text
    assert "Wait until" not in text
    assert kept.numel() == 190 * MB


def test_what_is_no_error_of_memory_has_no_facts() -> None:
    assert refusal_of(ValueError("\udc80")) is None
    assert refusal_of(RuntimeError("\udc80")) is None
