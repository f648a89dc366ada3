"""Private pools of torch's allocator, from birth to end: also where a step in between throws."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context
from tests.gpu.beside import at_once, beside
from tests.gpu.short_processes import run_python

pytestmark = pytest.mark.usefixtures("check_invariants")


def settle() -> None:
    """Have everything given back that nobody needs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def held_by_a_graph(context: pgk.ExecutionContext) -> tuple[int, int]:
    """What a graph adds to what the context uses, and what of it is left after the graph."""
    torch.cuda.empty_cache()
    with context_session(context):
        x = torch.ones(8 * MB, device="cuda")
        before = context.usage().used
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
        with_graph = context.usage().used
        graph.replay()
        assert y.sum().item() == 16 * MB
        del graph, y
    settle()
    return with_graph - before, context.usage().used - before


# Captures that fail -------------------------------------------------------------------------------


def synchronizes(context: pgk.ExecutionContext) -> None:
    (torch.ones(1000, device="cuda") * 2).sum().item()


def is_refused(context: pgk.ExecutionContext) -> None:
    torch.empty(context.usage().max, dtype=torch.uint8, device="cuda")


def is_interrupted(context: pgk.ExecutionContext) -> None:
    torch.ones(1000, device="cuda")
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [synchronizes, is_refused, is_interrupted])
def test_a_failed_capture_leaves_nothing_behind(
    fail: Callable[[pgk.ExecutionContext], None],
) -> None:
    context = create_context("a", GB)
    held, left = held_by_a_graph(context)
    pool = torch.cuda.graph_pool_handle()
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises((RuntimeError, KeyboardInterrupt)),
            context_session(context),
            torch.cuda.graph(graph, pool=pool),
        ):
            fail(context)
        del graph
        gc.collect()
    torch.cuda.set_stream(torch.cuda.default_stream())
    # The pool can be captured to again, which native refuses while it thinks that one goes on.
    with context_session(context):
        x = torch.ones(1000, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            y = x * 3
        graph.replay()
        assert y.sum().item() == 3000
        del graph, y, x
    gc.collect()
    assert held_by_a_graph(context) == (held, left)


def test_a_graph_that_goes_in_the_middle_of_its_capture_takes_it_along() -> None:
    context = create_context("a", GB)
    held, left = held_by_a_graph(context)
    stream = torch.cuda.Stream()
    with context_session(context), torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        x = torch.ones(1000, device="cuda")
        assert torch.cuda.is_current_stream_capturing()
        del graph, x
        gc.collect()
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.ones(1000, device="cuda").sum().item() == 1000
    assert held_by_a_graph(context) == (held, left)


def test_a_capture_that_is_ended_on_another_stream_goes_on() -> None:
    context = create_context("a", GB)
    stream = torch.cuda.Stream()
    with context_session(context):
        x = torch.ones(1000, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            y = x * 2
        with pytest.raises(RuntimeError, match="same stream"):
            graph.capture_end()
        with torch.cuda.stream(stream):
            z = y + 1
            graph.capture_end()
        graph.replay()
        assert z.sum().item() == 3000


# Who provides ------------------------------------------------------------------------------------


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
        for _ in range(100):
            pool = make()
            del pool
            gc.collect()
    settle()
    assert context.usage().used == 0
    assert torch.cuda.memory_reserved() <= before + 64 * MB


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


# Released pools ----------------------------------------------------------------------------------


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


# Torch's cache -----------------------------------------------------------------------------------


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


# Ends of graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_graphs_of_one_pool_go_in_any_order(order: tuple[int, ...]) -> None:
    context = create_context("a", GB)
    pool = torch.cuda.graph_pool_handle()
    with context_session(context):
        x = torch.ones(4 * MB, device="cuda")
        before = context.usage().used
        graphs = {}
        for i in range(3):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                y = x * (i + 1)
            graphs[i] = (graph, y)
        del graph, y
        for n, i in enumerate(order):
            graph, y = graphs.pop(i)
            graph.replay()
            assert y[0].item() == i + 1
            if n == 1:
                graph.reset()
            del graph, y
    settle()
    assert context.usage().used == before


def test_reduce_overhead_after_a_warm_up_outside_is_charged() -> None:
    f = torch.compile(lambda x: torch.relu(x * 3) + 1, mode="reduce-overhead", dynamic=False)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        f(torch.ones(1000, device="cuda"))
    context = create_context("a", 2 * GB)
    with context_session(context):
        x = torch.randn(12 * MB, device="cuda")
        before = context.usage().used
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            y = f(x)
        assert context.usage().used - before >= 48 * MB
        assert torch.allclose(y, torch.relu(x * 3) + 1)
        del y
    torch._dynamo.reset()
    settle()
    assert context.usage().used <= before


def test_reduce_overhead_outside_after_its_context_was_destroyed() -> None:
    context = create_context("a", 2 * GB)
    f = torch.compile(lambda x: torch.relu(x * 3) + 1, mode="reduce-overhead", dynamic=False)
    with context_session(context):
        x = torch.randn(8 * MB, device="cuda")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            f(x)
    context.destroy()
    g = torch.compile(lambda x: torch.sin(x) * 2, mode="reduce-overhead", dynamic=False)
    z = torch.randn(50 * MB, device="cuda")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        w = g(z)
    assert torch.allclose(w, torch.sin(z) * 2)


# Ends of processes -------------------------------------------------------------------------------


def test_a_process_ends_with_graphs_and_pools_alive() -> None:
    code = """
        import gc, torch, pygpukit_torch as pgk
        pgk.initialize(device="cuda", total_vram=4 * pgk.GB)
        kept = []
        for name in "ab":
            context = pgk.create_context(name, pgk.GB)
            session = pgk.context_session(context)
            session.__enter__()
            x = torch.ones(1000, device="cuda")
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
            with torch.cuda.graph(graph):
                y = x * 2
            with torch.cuda.use_mem_pool(pool):
                z = torch.ones(1000, device="cuda")
            graph.replay()
            kept.append((graph, pool, x, y, z))
            if name == "a":
                session.__exit__(None, None, None)
                context.destroy()
        f = torch.compile(lambda x: x * 2, mode="reduce-overhead")
        for _ in range(3):
            w = f(x)
        half = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            half.capture_begin(capture_error_mode="relaxed")
            torch.ones(10, device="cuda")
        print("end")
    """
    assert run_python(code) == "end"
