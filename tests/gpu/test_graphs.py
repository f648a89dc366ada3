"""CUDA graphs in sessions: their memory is the context's, and they work whatever others do."""

from __future__ import annotations

import gc
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import load_inline

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context
from tests.gpu.beside import at_once, beside

pytestmark = pytest.mark.usefixtures("check_invariants")

Captured = tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]


def work(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ x).sum(1) * 2


def captured(context: pgk.ExecutionContext, seed: int) -> Captured:
    with context_session(context):
        torch.manual_seed(seed)
        x = torch.randn(1024, 1024, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = work(x)
    return graph, x, y


def replayed(context: pgk.ExecutionContext, graph: Captured) -> torch.Tensor:
    with context_session(context):
        graph[1].mul_(0.5)
        graph[0].replay()
        return graph[2].clone()


def test_a_graphs_memory_is_charged_and_given_back() -> None:
    context = create_context("a", GB)
    work(torch.ones(8, 8, device="cuda"))  # native's own workspace
    native_before = torch.cuda.memory_reserved()
    graph, x, y = captured(context, 1)
    with_graph = context.usage().used
    total = torch.cuda.memory_allocated()
    assert with_graph >= 4 * MB + 2 * MB
    torch.testing.assert_close(replayed(context, (graph, x, y)), work(x))
    assert torch.cuda.memory_allocated() - total < 4 * MB
    # Everything that came since is the context's: native has nothing of it.
    assert torch.cuda.memory_reserved() - native_before <= context.usage().reserved + 64 * MB
    del y, graph
    gc.collect()
    torch.cuda.synchronize()
    with context_session(context):
        torch.empty(300 * MB, dtype=torch.uint8, device="cuda")
    assert context.usage().used < with_graph


def test_graphs_of_two_contexts_replay_at_once_and_one_outlives_the_other() -> None:
    a, b = create_context("a", GB), create_context("b", GB)
    graphs = {a: captured(a, 1), b: captured(b, 2)}

    def replay(context: pgk.ExecutionContext, times: int) -> None:
        for _ in range(times):
            result = replayed(context, graphs[context])
            torch.testing.assert_close(result, work(graphs[context][1]))
            graphs[context][1].normal_()

    at_once(*(partial(replay, context, 30) for context in graphs))
    del graphs[a]
    gc.collect()
    a.destroy()
    torch.cuda.empty_cache()
    hog = create_context("hog", 4 * GB)
    with context_session(hog):
        torch.ones(GB, device="cuda", dtype=torch.uint8).fill_(255)
    replay(b, 20)


def test_a_capture_beside_a_user_of_the_default_stream() -> None:
    context = create_context("a", GB)

    def use_the_default_stream() -> None:
        (torch.ones(1000, device="cuda") * 2).sum()

    with beside(use_the_default_stream):
        for seed in range(5):
            graph = captured(context, seed)
            torch.testing.assert_close(replayed(context, graph), work(graph[1]))


def test_other_contexts_grow_and_shrink_while_one_captures() -> None:
    capturing, busy = create_context("capturing", GB), create_context("busy", 4 * GB)
    sizes = itertools.cycle(range(1, 17))

    def allocate() -> None:
        with context_session(busy, wait=False):
            torch.empty(next(sizes) * 64 * MB, dtype=torch.uint8, device="cuda")
        busy._runtime.manager.trim()

    with beside(allocate):
        for seed in range(5):
            graph = captured(capturing, seed)
            torch.testing.assert_close(replayed(capturing, graph), work(graph[1]))


def test_an_overrun_in_a_capture_leaves_the_process_usable() -> None:
    context = create_context("small", 128 * MB)
    graph = torch.cuda.CUDAGraph()
    with context_session(context):
        x = torch.ones(16 * MB, dtype=torch.uint8, device="cuda")
        with (
            pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory.*'small'"),
            torch.cuda.graph(graph),
        ):
            kept = [x.repeat(2) for _ in range(20)]
        del graph
        gc.collect()
        torch.cuda.synchronize()
        assert x.min().item() == 1
    kept = []
    assert not kept
    fresh = captured(create_context("fresh", GB), 3)
    torch.testing.assert_close(replayed(pgk.get_context("fresh"), fresh), work(fresh[1]))
    with context_session(context):
        assert torch.ones(64 * MB, dtype=torch.uint8, device="cuda").min().item() == 1


def test_graphs_that_share_a_pool() -> None:
    context = create_context("a", GB)
    pool = torch.cuda.graph_pool_handle()
    with context_session(context):
        x = torch.randn(512, 512, device="cuda")
        work(x)
        graphs, outputs = [], []
        for _ in range(3):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                outputs.append(work(x))
            graphs.append(graph)
        for graph in graphs:
            graph.replay()
        for output in outputs:
            torch.testing.assert_close(output, work(x))
        graphs.pop(0).reset()
        x.normal_()
        for graph in graphs:
            graph.replay()
        for output in outputs[1:]:
            torch.testing.assert_close(output, work(x))
    used = context.usage().used
    del graph, output
    graphs.clear()
    outputs.clear()
    gc.collect()
    torch.cuda.synchronize()
    assert context.usage().used < used


def test_a_mempool_made_in_a_session_is_the_contexts() -> None:
    context = create_context("a", GB)
    with context_session(context):
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            x = torch.ones(4 * MB, device="cuda")
        assert 16 * MB <= context.usage().used < 40 * MB
    assert x.sum().item() == 4 * MB
    del x, pool
    gc.collect()
    assert context.usage().used == 0


def test_make_graphed_callables() -> None:
    context = create_context("a", GB)
    torch.manual_seed(0)
    with context_session(context):
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)
        ).cuda()
        x = torch.randn(32, 64, device="cuda", requires_grad=True)
        expected = model(x)
        expected.sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        graphed = torch.cuda.make_graphed_callables(model, (x,))
        result = graphed(x)
        result.sum().backward()
        torch.testing.assert_close(result, expected)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    assert context.usage().used > 0


def test_reduce_overhead_with_outputs_kept_alive() -> None:
    context = create_context("a", 2 * GB)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ x) * 2 + 1

    x = torch.randn(256, 256, device="cuda")
    with context_session(context):
        x = torch.randn(256, 256, device="cuda")
        compiled = torch.compile(function, mode="reduce-overhead")
        kept = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            kept.append(compiled(x).clone())
            output = compiled(x)  # alive while the next iteration begins
            torch.testing.assert_close(output, function(x), rtol=1e-3, atol=1e-3)
            x = x * 0.9
        assert len(kept) == 6
    assert context.usage().used > 0
    torch._dynamo.reset()


def test_reduce_overhead_in_two_contexts_charges_each_its_own() -> None:
    """All graph trees of a process share one pool; its segments are whose they are needed for."""
    contexts = [create_context(name, 2 * GB) for name in "ab"]

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 3) + 1

    compiled = torch.compile(function, mode="reduce-overhead", dynamic=False)
    kept = []
    for size, context in zip((32, 48), contexts, strict=True):
        with context_session(context):
            x = torch.randn(size * MB // 4, device="cuda")
            before = context.usage().used
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                output = compiled(x)
            torch.testing.assert_close(output, function(x))
            kept.append(x)
        assert context.usage().used - before >= size * MB
    del output, x, compiled
    kept.clear()
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for context in contexts:
        assert context.usage().used < 34 * MB


def test_a_free_memory_callback_may_help_a_context(tmp_path: Path) -> None:
    """Torch's own way for libraries to give memory back before a request fails."""
    source = """
        #include <c10/cuda/CUDACachingAllocator.h>
        #include <torch/extension.h>
        std::vector<at::Tensor> held;
        struct GiveBack : c10::FreeMemoryCallback {
          bool Execute() override {
            const bool any = !held.empty();
            held.clear();
            return any;
          }
        };
        namespace c10 { REGISTER_FREE_MEMORY_CALLBACK(give_back, ::GiveBack); }
        void hold(at::Tensor tensor) { held.push_back(std::move(tensor)); }
    """
    library = load_inline(
        "give_back",
        cpp_sources=[source],
        functions=["hold"],
        with_cuda=True,
        build_directory=str(tmp_path),
    )
    context = create_context("a", 256 * MB)
    with context_session(context):
        library.hold(torch.empty(200 * MB, dtype=torch.uint8, device="cuda"))
        assert context.usage().used == 200 * MB
        fits = torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
        assert fits.numel() == context.usage().used == 200 * MB
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
