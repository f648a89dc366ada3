"""What torch keeps for cuBLAS does not eat the budgets of contexts, nor outlive them."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context
from tests.gpu.beside import beside

pytestmark = pytest.mark.usefixtures("check_invariants")

WIDTH = 1024


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(6))
    return torch.nn.Sequential(*layers).to("cuda").requires_grad_(False)


def answer(of: torch.nn.Module) -> float:
    return of(torch.ones(64, WIDTH, device="cuda")).double().abs().sum().item()


def test_usage_tells_of_workspaces_and_they_go_with_their_context() -> None:
    context = create_context("a", GB)
    with context_session(context):
        assert context.usage().workspaces == 0
        x = torch.ones(256, 256, device="cuda")
        y = x @ x
        workspaces = context.usage().workspaces
        assert 0 < workspaces <= 64 * MB
        assert context.usage().used >= workspaces
        assert y[0, 0].item() == 256
    del x, y
    context.destroy()
    assert pgk.stats().contexts == ()


def test_a_model_is_reloaded_a_hundred_times_beside_a_busy_session() -> None:
    expected = [answer(model(seed)) for seed in range(3)]
    other = create_context("other", 128 * MB)
    with context_session(other):
        x = torch.ones(256, 256, device="cuda")
        x @ x
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x @ x

    def serve() -> None:
        with context_session(other):
            graph.replay()
            (x @ x).sum().item()

    left = []
    with beside(serve):
        for reload in range(100):
            context = create_context("model", 192 * MB)
            with context_session(context):
                loaded = model(reload % 3)
                result = answer(loaded)
            assert result == pytest.approx(expected[reload % 3], rel=1e-3)
            late = loaded[0].weight if reload % 4 == 3 else None
            if late is not None:
                context.destroy()
            del loaded
            gc.collect()
            if late is None:
                context.destroy()
            else:
                assert bool(torch.isfinite(late).all())
                del late
            torch.cuda.synchronize()
            left.append((pgk.stats().reserved, len(pgk.stats().contexts)))
    assert left[-1] == left[2]
    with context_session(other):
        graph.replay()
        assert y[0, 0].item() == 256


def test_forty_threads_share_the_budget_of_the_two_that_work() -> None:
    context = create_context("endpoint", 256 * MB, max_sessions=2)
    with context_session(context):
        torch.manual_seed(0)
        layer = torch.nn.Linear(512, 1024).to("cuda").requires_grad_(False)
        x = torch.randn(16, 512, device="cuda")
        expected = layer(x)
    everybody = threading.Barrier(40)

    def request(_: int) -> None:
        everybody.wait(30)
        with context_session(context, timeout=60):
            for _ in range(5):
                torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)

    with ThreadPoolExecutor(40) as threads:
        for _ in range(3):
            list(threads.map(request, range(40)))
    assert context.usage().workspaces <= 256 * MB


def test_a_graph_keeps_the_workspace_that_it_was_captured_with() -> None:
    context = create_context("a", GB)
    with context_session(context):
        x = torch.ones(512, 512, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x @ x  # makes the workspace ahead of the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = x @ x
    context.destroy()
    for turn in range(50):
        x.fill_(turn)
        graph.replay()
        torch.full((16 * MB,), float("nan"), device="cuda")
        assert y[0, 0].item() == turn * turn * 512
    del graph, x, y
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert pgk.stats().contexts == ()
