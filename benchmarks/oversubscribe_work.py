"""What ``oversubscribe`` serves: models, a request of one, and in which order they are asked."""

import math
import random
from collections import OrderedDict
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.llama import llama_config
from benchmarks.timings import CUDA, DEVICE
from pygpukit_torch import GB, MB

# Three models fit, with room for what a request needs beside the weights and for cuBLAS.
CAPACITY = 9 * GB // 4 if CUDA else 60 * MB
RATIOS = (2, 3)  # of all weights to the capacity
SHAPE = (2048, 4) if CUDA else (64, 1)
DTYPE = torch.bfloat16 if CUDA else torch.float32
PROMPT = torch.arange(2, 18).unsqueeze(0)
NEW_TOKENS = 2  # so that a request is short, and a switch is much of it

IN_TURN, SKEWED = "in turn", "skewed"


def llama(seed: int) -> torch.nn.Module:
    """Make a model on the device, with random weights from the seed."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    torch.manual_seed(seed)
    try:
        with torch.device(DEVICE):
            model: torch.nn.Module = LlamaForCausalLM(llama_config(*SHAPE))
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def weight_bytes() -> int:
    """Return the size of a model's weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(*SHAPE))
    return sum(parameter.numel() for parameter in model.parameters()) * DTYPE.itemsize


def fitting(weights: int) -> int:
    """Return how many models of so many bytes fit into the capacity."""
    return CAPACITY // weights


def needed(ratio: int, weights: int) -> int:
    """Return how many models have weights of at least ``ratio`` times the capacity."""
    return math.ceil(ratio * CAPACITY / weights)


def generated(model: Any) -> list[int]:
    """Generate from the prompt; the new tokens, on the host."""
    prompt = PROMPT.to(DEVICE)
    output = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens: list[int] = output[0, prompt.shape[1] :].tolist()
    return tokens


def requests(order: str, models: int, count: int, seed: int) -> list[int]:
    """Return which model each of ``count`` requests asks.

    ``in turn`` is one after the other, the worst for whoever keeps the most recently used ones.
    ``skewed`` is random by Zipf's law, from the seed: the last model is asked twice as often as the
    one before it, three times as often as the next. So those that are asked first in turn are the
    least likely to be resident from a skewed order before.
    """
    if order == IN_TURN:
        return [index % models for index in range(count)]
    shares = [1 / (models - index) for index in range(models)]
    return random.Random(seed).choices(range(models), shares, k=count)


class LeastRecentlyUsed:
    """Which models are resident where ``places`` of them fit."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._models: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, model: int) -> bool:
        return model in self._models

    def use(self, model: int) -> int | None:
        """Have it resident; the one that must go for it, if any."""
        self._models[model] = None
        self._models.move_to_end(model)
        return self._models.popitem(last=False)[0] if len(self._models) > self._places else None
