"""Private pools of torch's allocator: whose memory they have, and whom they serve."""

from __future__ import annotations

import gc
import time

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context
from tests.gpu.beside import beside
from tests.gpu.memory import beside_history

pytestmark = pytest.mark.usefixtures("check_invariants")


def test_a_pool_serves_whoever_captures_also_after_its_first_context() -> None:
    pool = torch.cuda.graph_pool_handle()
    graphs = []

    def capture() -> torch.Tensor:
        x = torch.ones(16 * MB, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            y = x * 2
        graph.replay()
        graphs.append((graph, x))
        return y

    native = torch.cuda.memory_reserved()
    outside = capture()
    a, b = create_context("a", GB), create_context("b", GB)
    with context_session(a):
        used = a.usage().used
        inside = capture()
        assert a.usage().used - used >= 128 * MB, "x, and the segment of y"
    a.destroy()
    with context_session(b):
        other = capture()
        assert b.usage().used >= 128 * MB
    after = capture()
    for y in (outside, inside, other, after):
        assert y.sum().item() == 32 * MB
    del outside, inside, other, after, y
    graphs.clear()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert b.usage().used == 0
    assert torch.cuda.memory_reserved() <= native + 64 * MB


def test_a_mempool_of_one_context_serves_another_and_nobody() -> None:
    a, b = create_context("a", GB), create_context("b", GB)
    with context_session(a):
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            x = torch.ones(32 * MB, device="cuda")
    assert a.usage().used >= 128 * MB
    with context_session(b), torch.cuda.use_mem_pool(pool):
        y = torch.ones(32 * MB, device="cuda")
        with context_session(a):
            z = torch.ones(16 * MB, device="cuda")  # nested: still from the pool
    assert b.usage().used >= 128 * MB
    with torch.cuda.use_mem_pool(pool):
        w = torch.ones(32 * MB, device="cuda")
    a.destroy()
    with context_session(b), torch.cuda.use_mem_pool(pool):
        v = torch.ones(4 * MB, device="cuda")
    assert [t.sum().item() / MB for t in (x, y, z, w, v)] == [32, 32, 16, 32, 4]
    del x, y, z, w, v
    del pool
    gc.collect()
    torch.cuda.synchronize()
    assert b.usage().used == 0
    assert [entry.name for entry in pgk.stats().contexts] == ["b"]


def test_threads_share_no_pool_of_another_thread() -> None:
    a = create_context("a", GB)

    def plain() -> None:
        with context_session(a):
            x = torch.ones(1000, device="cuda")
            assert not any(x.data_ptr() in range(*one) for one in segments)

    segments: list[tuple[int, int]] = []
    with context_session(a):
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            y = torch.ones(1000, device="cuda")
        segments += [(s["address"], s["address"] + s["total_size"]) for s in pool.snapshot()]
        with beside(plain):
            for _ in range(1000):
                with torch.cuda.use_mem_pool(pool):
                    y = torch.ones(1000, device="cuda")
                assert any(y.data_ptr() in range(*one) for one in segments)


def test_a_pool_that_does_not_split_has_a_segment_for_each_block() -> None:
    context = create_context("a", GB)
    with context_session(context):
        split, whole = torch.cuda.MemPool(), torch.cuda.MemPool(no_split=True)
        kept = []
        for pool in (split, whole):
            with torch.cuda.use_mem_pool(pool):
                kept += [torch.ones(MB, device="cuda") for _ in range(3)]
        assert len(split.snapshot()) == 1
        assert [len(segment["blocks"]) for segment in whole.snapshot()] == [1, 1, 1]
        assert all(x.sum().item() == MB for x in kept)


def test_a_pool_to_be_used_on_oom_serves_its_own_context_alone() -> None:
    a, b = create_context("a", 256 * MB), create_context("b", 64 * MB)
    with context_session(a):
        spare, closed = torch.cuda.MemPool(use_on_oom=True), torch.cuda.MemPool()
        full = []
        for pool in (spare, closed):
            with torch.cuda.use_mem_pool(pool):
                full.append(torch.ones(25 * MB, device="cuda"))  # 100 MiB
        address = full[0].data_ptr()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(80 * MB, dtype=torch.uint8, device="cuda")
        full.clear()
    for _ in range(100):
        with context_session(a):
            y = torch.full((20 * MB,), 3.0, device="cuda")
            assert y.data_ptr() == address
            with pytest.raises(torch.OutOfMemoryError, match="free in private pools"):
                torch.empty(80 * MB, dtype=torch.uint8, device="cuda")
            assert y.sum().item() == 60 * MB
            del y
        with context_session(b), pytest.raises(torch.OutOfMemoryError):
            torch.empty(80 * MB, dtype=torch.uint8, device="cuda")
    del spare
    gc.collect()
    with context_session(a), pytest.raises(torch.OutOfMemoryError):
        torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
    with context_session(a):
        torch.empty(100 * MB, dtype=torch.uint8, device="cuda")  # what the pool gave back


def test_last_resorts_beside_threads_that_use_pools() -> None:
    context, other = create_context("a", 256 * MB), create_context("b", GB)
    with context_session(context):
        spare = torch.cuda.MemPool(use_on_oom=True)
        with torch.cuda.use_mem_pool(spare):
            x = torch.ones(50 * MB, device="cuda")
        del x

    served = refused = 0

    def beyond_the_budget() -> bool:
        with context_session(context):
            try:
                y = torch.full((20 * MB,), 2.0, device="cuda")
            except torch.OutOfMemoryError:
                return False  # somebody uses the pool at this moment
            assert y[-1].item() == 2
            return True

    def use_pools() -> None:
        with context_session(other):
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                torch.ones(1000, device="cuda")
            with torch.cuda.use_mem_pool(spare):
                torch.ones(1000, device="cuda")

    end = time.monotonic() + 3
    with beside_history(), beside(use_pools), beside(use_pools):
        while time.monotonic() < end:
            if beyond_the_budget():
                served += 1
            else:
                refused += 1
    assert served > 0
    print(f"{served} served, {refused} refused")
    assert beyond_the_budget()


def test_what_torch_did_not_allocate_may_name_streams() -> None:
    context = create_context("a", GB)

    class Foreign:
        """The middle of somebody's memory, as another library would hand it out."""

        def __init__(self, of: torch.Tensor) -> None:
            self.of = of
            self.__cuda_array_interface__ = {
                "shape": (16,),
                "typestr": "<f4",
                "data": (of.data_ptr() + 1024, False),
                "version": 3,
            }

    with context_session(context):
        inside = torch.ones(1000, device="cuda")
    for of in (inside, torch.ones(1000, device="cuda")):
        foreign = torch.as_tensor(Foreign(of), device="cuda")
        assert foreign.data_ptr() == of.data_ptr() + 1024
        foreign.record_stream(torch.cuda.Stream())
        assert foreign.sum().item() == 16
