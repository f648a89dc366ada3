"""What the models of ``models`` do: turns of one at a time, forward passes of several at once.

All weights are random, and bf16 on CUDA. What a turn draws comes from its seed.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, BertConfig, BertModel, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.beside import Border
from benchmarks.llama import llama_config
from benchmarks.models_at_once import DECODE, ENCODE, SECOND
from benchmarks.timings import CUDA, DEVICE, now
from benchmarks.traces import bf16

LLAMA = (2048, 16) if CUDA else (64, 1)
TRAINED = (1024, 4) if CUDA else (64, 1)
PROMPT = 64
NEW_TOKENS = 16 if CUDA else 2
# Every turn has all of these in an order of its own: shapes that are new would load kernels.
LENGTHS = (64, 192, 256, 320, 384, 512) if CUDA else (8, 32)
SEQUENCES = 32 if CUDA else 4  # that are embedded in a batch
ENCODED = (64, 256) if CUDA else (4, 16)  # in a forward pass beside other models
FIRST_TOKEN, TOKENS = 2, 30_000

Turn = Callable[[random.Random], None]
Pass = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What a model does in a turn, and how many units that is."""

    unit: str
    amount: int
    turn: Turn

    def rate(self, seed: int) -> float:
        """Return units a second of a turn: until all is done, borders included."""
        choice = random.Random(seed)
        start = now()
        self.turn(choice)
        return self.amount / (now() - start)


# One at a time -----------------------------------------------------------------------------------


def works_of(border: Border) -> dict[str, Work]:
    """Make models behind the border, and what they do there."""
    with border(), _new():
        llama = _llama()
    works = {
        f"generate, batch {batch}": Work(
            "tokens/s", NEW_TOKENS * batch, _generating(border, llama, batch)
        )
        for batch in (1, 16)
    }
    works["embedding"] = Work("sequences/s", len(LENGTHS) * SEQUENCES, _embedding(border))
    works["training"] = Work("steps/s", len(LENGTHS), _training(border))
    return works


def _generating(border: Border, model: Any, batch: int) -> Turn:
    def turn(_: random.Random) -> None:
        with border():
            prompt = _tokens(batch, PROMPT)
            model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)

    return turn


def _embedding(border: Border) -> Turn:
    """Serve batches of sequences of mixed lengths, as requests whose results are read."""
    with border(), _new():
        model = _bert()

    @torch.no_grad()
    def embedded(lengths: list[int]) -> torch.Tensor:
        ids = _tokens(len(lengths), max(lengths))
        ends = torch.tensor(lengths, device=DEVICE)[:, None]
        mask = (torch.arange(max(lengths), device=DEVICE) < ends).long()
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        means: torch.Tensor = (states * mask[..., None]).sum(1) / ends
        return means

    def turn(choice: random.Random) -> None:
        for longest in _shuffled(choice):
            lengths = [longest, *(choice.randint(1, longest) for _ in range(SEQUENCES - 1))]
            with border():
                means = embedded(lengths)
            means.cpu()

    return turn


def _training(border: Border) -> Turn:
    """Train with AdamW on batches of all lengths."""
    with border(), _new():
        model = LlamaForCausalLM(llama_config(*TRAINED)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def turn(choice: random.Random) -> None:
        with border():
            for length in _shuffled(choice):
                ids = _tokens(4, length)
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    return turn


def _shuffled(choice: random.Random) -> list[int]:
    return choice.sample(LENGTHS, len(LENGTHS))


# Several at once ---------------------------------------------------------------------------------


# Transformers makes no masks for attention that it does not know. These passes need none, but while
# a graph is captured there would be some: other work than without a graph.
UNMASKED = "sdpa without masks"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


def _decode() -> Pass:
    """Make what computes one token of a Llama, without what came before it."""
    with _new():
        model = _llama()
    model.set_attn_implementation(UNMASKED)
    ids = _tokens(1, 1)
    return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False).logits)


def _encode() -> Pass:
    with _new():
        model = _bert()
    model.set_attn_implementation(UNMASKED)
    ids = _tokens(*ENCODED)
    return torch.no_grad()(lambda: model(input_ids=ids).last_hidden_state)


PASSES: dict[str, Callable[[], Pass]] = {DECODE: _decode, ENCODE: _encode, SECOND: _decode}


@contextmanager
def _new() -> Iterator[None]:
    """Make modules on the device, with its type of numbers."""
    with torch.device(DEVICE), bf16() if CUDA else nullcontext():
        yield


def _llama() -> Any:
    return LlamaForCausalLM(llama_config(*LLAMA)).eval()


def _bert() -> Any:
    config = BertConfig() if CUDA else BertConfig(hidden_size=96, num_hidden_layers=2)
    return BertModel(config, add_pooling_layer=False).eval()


def _tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(FIRST_TOKEN, TOKENS, (rows, length), device=DEVICE)
