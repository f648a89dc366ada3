"""What a forked child may do: read, write for itself, free; but not use the device."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pygpukit_torch as pgk
from pygpukit_torch import MB, ForkError, native
from pygpukit_torch import runtime as pgk_runtime

pytestmark = [
    pytest.mark.usefixtures("scheduler"),
    # Forking beside torch's idle threads is what a DataLoader does, too.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]


def in_child(action: Callable[[], Any]) -> Any:
    """Fork, run ``action`` in the child and return what it returned there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not hang the test
        torch.set_num_threads(1)  # OpenMP does not survive a fork; DataLoader workers do the same
        try:
            result: Any = ("returned", action())
        except BaseException:
            result = ("raised", traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"
    kind, value = pickle.loads(data)
    assert kind == "returned", value
    return value


@pytest.fixture
def context() -> pgk.ExecutionContext:
    return pgk.create_context("a", 64 * MB)


def test_a_childs_writes_stay_in_the_child(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        tensor = torch.ones(5 * MB // 4)

    def write() -> float:
        tensor.mul_(2)
        return float(tensor.sum())

    assert in_child(write) == 2 * tensor.numel()
    assert (tensor == 1).all()


def test_a_child_leaves_partitions_alone(context: pgk.ExecutionContext) -> None:
    managers = [native.PartitionManager(native.PartitionConfig(64 * MB))]
    managers[0].create_partition("p", "P", native.PartitionLimits())
    context.evict()

    def change() -> list[str]:
        refusals = []
        for action in (
            lambda: managers[0].create_partition("q", "Q", native.PartitionLimits()),
            lambda: managers[0].delete_partition("p"),
            lambda: managers[0].assign(context, "p"),
        ):
            with pytest.raises(ForkError) as raised:
                action()
            refusals.append(type(raised.value).__name__)
        managers.clear()
        return refusals

    assert in_child(change) == ["ForkError"] * 3
    assert managers[0].partition_ids == ["p"]
    managers[0].assign(context, "p")


def test_evicted_memory_is_the_childs_own_too(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        tensor = torch.ones(5 * MB // 4)
    context.evict()

    def write() -> float:
        tensor.mul_(2)
        return float(tensor.sum())

    assert in_child(write) == 2 * tensor.numel()
    assert (tensor == 1).all()
    context.restore()
    assert (tensor == 1).all()


def test_forking_while_pages_move(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        tensor = torch.arange(10 * MB // 4)
    stop, may_move = threading.Event(), threading.Event()
    may_move.set()
    # What a child reads the parent must leave alone: from the fork on nothing is moved twice.
    os.register_at_fork(after_in_parent=may_move.clear)

    def move() -> None:
        while not stop.is_set():
            may_move.wait()
            context.evict()
            may_move.wait()
            context.restore()

    thread = threading.Thread(target=move, daemon=True)
    thread.start()
    try:
        for _ in range(10):
            assert in_child(lambda: int(tensor[-1]) + int(tensor[0])) == tensor.numel() - 1
            may_move.set()
    finally:
        stop.set()
        may_move.set()
        thread.join()
    assert torch.equal(tensor, torch.arange(10 * MB // 4))


def test_a_memory_pool_stays_the_parents() -> None:
    pool = native.MemoryPool(64 * MB, True)
    block, other = pool.allocate(5 * MB), pool.allocate(5 * MB)
    tensor = block.as_tensor().fill_(1)

    def use() -> int:
        for refused in (
            lambda: pool.allocate(1),
            lambda: pool.free(block),
            lambda: pool.evict(other),
            other.as_tensor,
            pool.clear,
        ):
            with pytest.raises(ForkError, match="forked child of the one that made the memory"):
                refused()
        return int(tensor.mul_(2).sum())

    assert in_child(use) == 2 * tensor.numel()
    assert (tensor == 1).all()
    pool.evict(other)
    pool.check_invariants()


def test_a_memory_pool_that_a_child_drops_keeps_the_parents_memory() -> None:
    held = [native.MemoryPool(64 * MB).allocate(5 * MB)]
    held[0].as_tensor().fill_(1)
    in_child(held.clear)
    assert held[0].as_tensor().eq(1).all()


class InPlace(Dataset[torch.Tensor]):
    """Augments its samples in place, as carelessly written data sets do."""

    def __init__(self, samples: torch.Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.samples[index].add_(100)


def test_a_data_loaders_workers_do_not_change_the_parent(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        samples = torch.arange(64.0).reshape(16, 4)
        loader = DataLoader(InPlace(samples), batch_size=4, num_workers=2)
        batches = torch.cat(list(loader))
    assert torch.equal(batches, torch.arange(64.0).reshape(16, 4) + 100)
    assert torch.equal(samples, torch.arange(64.0).reshape(16, 4))


def test_a_child_may_free_and_allocate(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        tensors = [torch.full((1000,), float(index)) for index in range(10)]

    def work() -> list[float]:
        del tensors[::2]
        fresh = torch.ones(100_000)
        return [float(tensor[0]) for tensor in tensors] + [float(fresh.sum())]

    assert in_child(work) == [1, 3, 5, 7, 9, 100_000]
    assert [float(tensor[999]) for tensor in tensors] == list(range(10))
    assert context.usage().used == 10 * 4096


def test_no_session_is_left_over(context: pgk.ExecutionContext) -> None:
    def inside() -> int:
        tensor = torch.ones(1000)  # from the stock allocator
        return int(tensor.sum())

    with pgk.context_session(context):
        before = context.usage().used
        assert in_child(inside) == 1000
        assert context.usage().used == before
        assert pgk.current_context() is context


def test_a_child_leaves_its_parents_session_in_peace(context: pgk.ExecutionContext) -> None:
    def leave() -> str:
        session.__exit__(None, None, None)
        return "left"

    with pgk.context_session(context) as session:
        assert in_child(leave) == "left"
    assert context.state == "idle"


def test_using_the_device_in_a_child_is_a_clear_error(context: pgk.ExecutionContext) -> None:
    def attempt() -> list[str]:
        actions: list[Callable[[], object]] = [
            lambda: pgk.create_context("b", 4 * MB),
            lambda: pgk.context_session(context).__enter__(),
            context.usage,
            context.destroy,
            lambda: context.resize(4 * MB),
            lambda: context.place(torch.ones(1)),
            pgk.stats,
            pgk.list_contexts,
            pgk.initialize,
            pgk.shutdown,
        ]
        texts = []
        for action in actions:
            try:
                action()
            except ForkError as error:
                texts.append(str(error))
        assert "parent process" in repr(context)
        return texts

    texts = in_child(attempt)
    assert len(texts) == 10
    assert all("forked child" in text for text in texts)


def test_a_child_does_not_wait_for_locks_of_threads_it_lost(
    context: pgk.ExecutionContext,
) -> None:
    runtime = pgk_runtime.get_or_initialize()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with runtime.lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def attempt() -> int:
        refused = 0
        actions: list[Callable[[], object]] = [
            context.destroy,
            lambda: context.resize(8 * MB),
            context.stream.synchronize,
            lambda: pgk.record_event(context),
            pgk.stats,
        ]
        for action in actions:
            with contextlib.suppress(ForkError):
                action()
                continue
            refused += 1
        return refused

    try:
        assert in_child(attempt) == 5
    finally:
        done.set()
        thread.join()


def test_a_child_of_a_process_without_a_device_can_have_its_own() -> None:
    pgk.shutdown()

    def work() -> int:
        pgk.initialize(device="cpu", total_vram=32 * MB)
        context = pgk.create_context("own", 8 * MB)
        with pgk.context_session(context):
            tensor = torch.ones(1000)
        return int(tensor.sum()) + context.usage().used

    assert in_child(work) == 1000 + 4096
    pgk.initialize(device="cpu", total_vram=32 * MB)


def test_forking_while_other_threads_allocate(context: pgk.ExecutionContext) -> None:
    """No lock may be held in the child by a thread that does not exist there."""
    stop = threading.Event()

    def allocate(index: int) -> None:
        own = pgk.create_context(f"own-{index}", 32 * MB)
        while not stop.is_set():
            with pgk.context_session(context):
                shared = torch.empty(3000)
            with pgk.context_session(own):
                torch.empty(1 << 20)
            del shared
            own.resize(32 * MB)
        own.destroy()

    threads = [threading.Thread(target=allocate, args=(index,)) for index in range(2)]
    with pgk.context_session(context):
        tensor = torch.ones(1000)
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert in_child(lambda: float(torch.ones(10).sum() + tensor.clone().sum())) == 1010
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_spawned_processes_start_afresh(context: pgk.ExecutionContext) -> None:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        assert pool.apply(_in_spawned_process) == 4096


def _in_spawned_process() -> int:
    pgk.initialize(device="cpu", total_vram=32 * MB)
    with pgk.context_session(pgk.create_context("own", 8 * MB)) as session:
        tensor = torch.ones(1000)
        assert tensor.sum() == 1000
        return session.context.usage().used


def test_a_child_knows_refusals_while_other_threads_are_refused(
    context: pgk.ExecutionContext,
) -> None:
    with pgk.context_session(context), pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(65 * MB, dtype=torch.uint8)
    stop = threading.Event()

    def be_refused() -> None:
        with pgk.context_session(context):
            while not stop.is_set():
                with contextlib.suppress(torch.OutOfMemoryError):
                    torch.empty(66 * MB, dtype=torch.uint8)

    def requested() -> int:
        known = pgk.refusal_of(caught.value)
        return 0 if known is None else known.requested

    threads = [threading.Thread(target=be_refused) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        # It may be forgotten by then: 256 are kept.
        answers = {in_child(requested) for _ in range(40)}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert answers <= {0, 65 * MB}
