"""What private pools and torch keep, and who gives way: nobody waits for it in vain."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context
from tests.gpu.beside import at_once, beside
from tests.gpu.memory import beside_history, settle

pytestmark = pytest.mark.usefixtures("check_invariants")


@contextmanager
def busy(seconds: float = 2) -> Iterator[torch.cuda.Stream]:
    """Somebody else's stream that has work for so long."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(seconds * 1.7e9))
    yield stream
    stream.synchronize()


def released_pools_with_a_live_tensor(context: pgk.ExecutionContext) -> list[torch.Tensor]:
    kept = []
    with context_session(context):
        for _ in range(2):
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                kept.append(torch.ones(1000, device="cuda"))
            del pool
    gc.collect()
    return kept


@pytest.mark.parametrize("maker", ["none", "a session"])
def test_a_mempool_goes_while_others_are_in_use(maker: str) -> None:
    """Torch's destructor empties it, which native refuses with an error that ends the process."""
    context, other = create_context("a", GB), create_context("b", GB)
    kept = torch.cuda.MemPool()

    def pool_with_memory() -> torch.cuda.MemPool:
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            torch.ones(8 * MB, device="cuda")
        return pool

    def make() -> torch.cuda.MemPool:
        if maker == "none":
            return pool_with_memory()
        with context_session(context):
            return pool_with_memory()

    def use_another() -> None:
        with context_session(other), torch.cuda.use_mem_pool(kept):
            torch.ones(1000, device="cuda")

    before = torch.cuda.memory_reserved()
    with beside(use_another):
        for _ in range(30):
            pool = make()
            del pool
    settle()
    assert context.usage().used == 0
    assert torch.cuda.memory_reserved() <= before + 64 * MB


def test_a_mempool_goes_with_a_live_tensor_while_others_are_in_use() -> None:
    context = create_context("a", GB)
    kept = torch.cuda.MemPool()

    def use_another() -> None:
        with context_session(context), torch.cuda.use_mem_pool(kept):
            torch.ones(1000, device="cuda")

    with beside(use_another), beside_history():
        for turn in range(30):
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                x = torch.full((1000,), turn, device="cuda")
            del pool
            assert x.sum().item() == 1000 * turn


def test_a_miss_does_not_wait_for_the_device_because_of_released_pools() -> None:
    pools, other = create_context("pools", GB), create_context("other", 15 * GB)
    kept = released_pools_with_a_live_tensor(pools)
    filler = create_context("filler", 15 * GB)
    with context_session(filler):
        filling = torch.zeros(14 * GB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with busy() as stream:
        with context_session(other):
            x = torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
        assert not stream.query()
    assert kept[0].sum().item() == 1000
    assert x.numel() == 64 * MB
    assert filling[-1].item() == 0


def test_released_pools_leave_captures_alone() -> None:
    pools, other = create_context("pools", GB), create_context("other", 12 * GB)
    kept = released_pools_with_a_live_tensor(pools)
    begun = threading.Event()

    def capture() -> None:
        y = torch.ones(1000, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            z = y * 2
            begun.set()
            time.sleep(1)
            z += 1
        graph.replay()
        assert z.sum().item() == 3000

    def miss() -> None:
        begun.wait(10)
        with context_session(other):
            for size in range(1, 11):
                torch.empty(size * GB, dtype=torch.uint8, device="cuda")

    at_once(capture, miss)
    assert kept[1].sum().item() == 1000


def test_pools_that_were_released_in_a_capture_come_back_after_it() -> None:
    context = create_context("a", GB)
    with context_session(context):
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            x = torch.ones(32 * MB, device="cuda")
        used = context.usage().used
        del x
        y = torch.ones(1000, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = y * 2
            del pool
            gc.collect()
        graph.replay()
        assert z.sum().item() == 2000
    torch.cuda.synchronize()
    assert context.usage().used <= used - 128 * MB + 4 * MB


@pytest.mark.parametrize("way", ["entering", "restore", "prefetch", "reservation"])
def test_torchs_cache_gives_way(way: str) -> None:
    context = create_context("a", 3 * GB)
    with context_session(context):
        x = torch.arange(256 * MB, dtype=torch.int64, device="cuda")
    total = x.sum().item()
    context.evict()
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - 512 * MB, dtype=torch.uint8, device="cuda")
    hog[-1] = 1
    del hog
    if way == "reservation":
        create_context("reserves", 2 * GB, qos=pgk.QoSPolicy.GUARANTEED)
        torch.cuda.empty_cache()
    elif way == "restore":
        context.restore()
    elif way == "prefetch":
        context.prefetch()
        deadline = time.monotonic() + 20
        while context.usage().evicted and time.monotonic() < deadline:
            time.sleep(0.01)
    with context_session(context):
        assert not context.usage().evicted
        assert x.sum().item() == total


def test_best_effort_gives_way_to_small_requests_outside_of_sessions() -> None:
    context = create_context("a", 2 * GB, qos=pgk.QoSPolicy.BEST_EFFORT)
    with context_session(context):
        x = torch.arange(128 * MB, dtype=torch.int64, device="cuda")
    settle()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - 12 * MB, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info()[0] < 20 * MB
    y = torch.ones(2 * MB, dtype=torch.uint8, device="cuda")  # native takes 20 MiB for it
    assert context.usage().evicted > 0
    del hog
    torch.cuda.empty_cache()
    assert y.sum().item() == 2 * MB
    assert x[-1].item() == 128 * MB - 1
