"""What the two sides of ``qos`` do: requests of the guaranteed one, loads of best effort."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.beside import Operation, mark
from benchmarks.llama import llama_config
from benchmarks.qos_ways import Sides
from benchmarks.timings import CUDA, DEVICE
from pygpukit_torch import GB, MB

DTYPE = torch.bfloat16 if CUDA else torch.float32
QUEUED = 8 if CUDA else 1  # the host device has done its work when it is submitted
NEW_TOKENS = 2
LLAMA = (2048, 2) if CUDA else (128, 1)

GRAPH, GENERATE = "graph", "generate"


class Decode:
    """One step of a Llama's decode for one token; on CUDA a graph."""

    def __init__(self, capture_on: torch.cuda.Stream | None) -> None:
        self._hidden, self._inner, layers = (4096, 11008, 8) if CUDA else (256, 512, 2)
        shapes = (
            (self._hidden, 3 * self._hidden),
            (self._hidden, self._hidden),
            (self._hidden, 2 * self._inner),
            (self._inner, self._hidden),
        )
        self._layers = [[_random(*shape).mul_(0.01) for shape in shapes] for _ in range(layers)]
        self._token = _random(1, self._hidden)
        self._run: Callable[[], object] = self._step
        if CUDA:
            self._step()  # loads what cannot be loaded during a capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=capture_on):
                self._step()
            self._run = graph.replay

    def __call__(self) -> None:
        """Submit it to the current stream."""
        self._run()

    def _step(self) -> None:
        state = self._token
        for attention, output, into, down in self._layers:
            state = (state @ attention)[:, : self._hidden] @ output + state
            gate, value = (state @ into).split(self._inner, dim=1)
            state = (torch.nn.functional.silu(gate) * value) @ down + state
            state = state / (state.norm() + 1)


def requests_of(sides: Sides) -> dict[str, Callable[[], None]]:
    """Make the requests of the guaranteed side. Calling one serves it: it is done on return."""
    with sides.guaranteed():
        works: dict[str, Callable[[], object]] = {
            GRAPH: Decode(sides.capture_on),
            GENERATE: _generate(),
        }

    def serve(work: Callable[[], object]) -> None:
        with sides.guaranteed():
            work()
            mark()()  # not for what others have submitted since, where they share the stream

    return {name: partial(serve, work) for name, work in works.items()}


def loads_of(sides: Sides) -> dict[str, Operation]:
    """Make what the best-effort side repeats."""
    side, size = (8192, GB) if CUDA else (256, 4 * MB)
    with sides.best_effort():
        a, b, product = (_random(side, side) for _ in range(3))
        source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        target = torch.zeros_like(source)
        generate = _generate()
    return {
        "matmul": Operation(partial(torch.mm, a, b, out=product), QUEUED),
        "copies": Operation(partial(target.copy_, source), QUEUED),
        GENERATE: Operation(generate),
    }


def item() -> None:
    """Wait for the default stream, as code that prints a loss does."""
    torch.ones(8, device=DEVICE).sum().item()


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def _generate() -> Callable[[], object]:
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(llama_config(*LLAMA))
    model.to(dtype=DTYPE).eval()
    prompt = torch.randint(2, 32000, (1, 64), device=DEVICE)
    return partial(model.generate, prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
