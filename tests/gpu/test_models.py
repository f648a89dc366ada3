"""Models of Hugging Face, unmodified, give in a session what they give outside."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context
from tests.gpu import models
from tests.gpu.beside import at_once

pytestmark = pytest.mark.usefixtures("check_invariants")

Forward = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(params=["llama", "bert"])
def forward(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Forward]:
    """A model on the CPU, and what of its output is compared."""
    if request.param == "llama":
        return models.llama(layers=2), lambda output: output.logits
    return models.bert(), lambda output: output.last_hidden_state


def run_eager(model: torch.nn.Module, pick: Forward, ids: torch.Tensor) -> list[torch.Tensor]:
    return [pick(model(ids + step)).clone() for step in range(3)]


def run_graph(model: torch.nn.Module, pick: Forward, ids: torch.Tensor) -> list[torch.Tensor]:
    static = ids.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            pick(model(static))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = pick(model(static))
    results = []
    for step in range(3):
        static.copy_(ids + step)
        graph.replay()
        results.append(output.clone())
    return results


def run_reduce_overhead(
    model: torch.nn.Module, pick: Forward, ids: torch.Tensor
) -> list[torch.Tensor]:
    compiled = torch.compile(model, mode="reduce-overhead")
    results, alive = [], []
    for step in [0, 0, 0, 1, 2]:
        torch.compiler.cudagraph_mark_step_begin()
        alive.append(pick(compiled(ids + step)))
        results.append(alive[-1].clone())
    return results[2:]


WAYS = {"eager": run_eager, "graph": run_graph, "reduce-overhead": run_reduce_overhead}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_identical_inside_and_outside(
    forward: tuple[torch.nn.Module, Forward], way: str
) -> None:
    on_cpu, pick = forward
    context = create_context("model", 4 * GB)
    ids = models.tokens(2, 64, 900)
    with torch.no_grad():
        outside = WAYS[way](copy.deepcopy(on_cpu).cuda(), pick, ids)
        torch._dynamo.reset()
        native_before = torch.cuda.memory_allocated() - context.usage().used
        with context_session(context):
            model = on_cpu.cuda()
            inside = WAYS[way](model, pick, ids)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        assert context.usage().used >= weights
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)
    assert native_before >= 0
    torch._dynamo.reset()


def test_generate_is_the_same_token_for_token() -> None:
    model = models.llama()
    ids = models.tokens(1, 16, 2000)
    settings: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False}
    outside = copy.deepcopy(model).cuda().generate(ids, **settings)
    context = create_context("llm", 2 * GB)
    with context_session(context):
        inside = model.cuda().generate(ids, **settings)
    assert torch.equal(outside, inside)


def test_generate_in_a_thread_with_a_streamer_is_charged() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.streams: set[int] = set()
            self.values: list[int] = []
            self.ended = threading.Event()

        def put(self, value: torch.Tensor) -> None:
            self.streams.add(torch.cuda.current_stream().cuda_stream)
            self.values += value.flatten().tolist()

        def end(self) -> None:
            self.ended.set()

    context = create_context("llm", 2 * GB)
    ids, streamer = models.tokens(1, 16, 2000), Collect()
    native_before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with context_session(context):
        model = models.llama().cuda()
        expected = model.generate(ids, max_new_tokens=32, do_sample=False)
        contexts_before = context.memory_stats()["allocation.all.allocated"]
        native_before = torch.cuda.memory_stats()["allocation.all.allocated"]
        worker = threading.Thread(
            target=model.generate,
            args=(ids,),
            kwargs={"max_new_tokens": 32, "do_sample": False, "streamer": streamer},
        )
        worker.start()
    worker.join()
    assert streamer.ended.is_set()
    assert streamer.values == expected.flatten().tolist()
    assert streamer.streams == {context.stream.id}
    contexts = context.memory_stats()["allocation.all.allocated"] - contexts_before
    # Every allocation of the process since was the context's.
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - native_before == contexts > 100


def test_an_overrun_in_generate_leaves_the_process_usable() -> None:
    context = create_context("llm", 96 * MB)
    with context_session(context):
        model = models.llama().cuda()
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory.*'llm'"):
            model.generate(models.tokens(64, 256, 2000), max_new_tokens=400, do_sample=False)
        short = model.generate(models.tokens(1, 8, 2000), max_new_tokens=8, do_sample=False)
    assert short.shape == (1, 16)
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    del model
    assert context.usage().max == 96 * MB


def test_two_models_generate_at_once_in_their_own_contexts() -> None:
    contexts = [create_context(name, 2 * GB) for name in "ab"]
    ids = models.tokens(1, 16, 2000)
    loaded = []
    for context in contexts:
        with context_session(context):
            loaded.append(models.llama().cuda())
    with context_session(contexts[0]):
        expected = loaded[0].generate(ids, max_new_tokens=48, do_sample=False)
    results: dict[str, torch.Tensor] = {}

    def work(context: pgk.ExecutionContext, model: Any) -> None:
        with context_session(context):
            for _ in range(3):
                results[context.name] = model.generate(ids, max_new_tokens=48, do_sample=False)

    at_once(*(partial(work, *pair) for pair in zip(contexts, loaded, strict=True)))
    for context in contexts:
        assert torch.equal(results[context.name], expected)
