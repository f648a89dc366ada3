"""Captures that fail, stop in the middle or are joined, and what graphs leave when they go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context
from tests.gpu.beside import beside
from tests.gpu.memory import settle
from tests.gpu.mover import Mover
from tests.gpu.short_processes import run_python

pytestmark = pytest.mark.usefixtures("check_invariants")


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


def test_a_stream_of_a_context_that_joins_a_capture_gets_its_memory_from_the_graph() -> None:
    context = create_context("a", GB)
    x = torch.ones(MB, device="cuda")
    own = torch.cuda.ExternalStream(context.stream.id)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            y = x * 2
        torch.cuda.current_stream().wait_stream(own)
        z = y + 1
    assert context.usage().used == 0
    del y
    with context_session(context):
        noise = torch.full((64 * MB,), float("nan"), device="cuda")
    graph.replay()
    assert z.sum().item() == 3 * MB
    assert noise[0].isnan()


def test_a_capture_that_uses_another_pool_for_a_while_is_left_alone() -> None:
    context, moved = create_context("a", GB), create_context("moved", GB)
    with context_session(moved):
        data = torch.ones(64 * MB, device="cuda")
    device = torch.cuda.current_device()
    with beside(Mover(moved)), context_session(context):
        other = torch.cuda.MemPool()
        for turn in range(10):
            x = torch.full((1000,), turn, device="cuda")
            graph = torch.cuda.CUDAGraph()
            pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                y = x * 2
                torch._C._cuda_endAllocateToPool(device, pool)
                with torch.cuda.use_mem_pool(other):
                    z = y + 1
                    time.sleep(0.05)
                torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
                w = z * 3
            torch._C._cuda_releasePool(device, pool)  # the second begin's
            graph.replay()
            assert w[0].item() == 3 * (2 * turn + 1)
    assert data.sum().item() == 64 * MB


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
