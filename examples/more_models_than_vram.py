"""Nine models that need more than twice the memory of the device, served in turns by tier.

    assistant            asked most often; its memory is reserved, so it never waits    guaranteed
    coder, writer        answer sixteen prompts at once; their weights are reserved     burstable
    six others           share what is left, one after the other                        best effort

Best effort gives way to everyone, and can only have the room of best effort. So each of them can be
served as long as what is reserved, and one of them, fit together.

The models are Llamas with random weights, made where they run: 28 GiB of them for 12 GiB of VRAM,
with up to 36 GiB of host memory to evict them to; without a GPU 440 MiB for 192 MiB of host memory.
Every answer must be, bit by bit, the first one of that model. On a terminal, a table shows who is
where meanwhile.
"""

import random
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from pygpukit_torch import (
    GB,
    MB,
    ExecutionContext,
    QoSPolicy,
    context_session,
    create_context,
    initialize,
    list_contexts,
    shutdown,
    stats,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CAPACITY = 12 * GB if CUDA else 192 * MB
HIDDEN = 2048 if CUDA else 512
VOCABULARY = 8000 if CUDA else 1000
PERCENT = CAPACITY // 100
SCALE, UNIT = (GB, "GiB") if CUDA else (MB, "MiB")
REQUESTS = 50

# name, tier, budget, reserved part of it, layers, prompts at once, how often it is asked
MODELS = [
    ("assistant", QoSPolicy.GUARANTEED, 20 * PERCENT, None, 22 if CUDA else 2, 1, 6),
    ("coder", QoSPolicy.BURSTABLE, 36 * PERCENT, 14 * PERCENT, 17 if CUDA else 1, 16, 2),
    ("writer", QoSPolicy.BURSTABLE, 36 * PERCENT, 14 * PERCENT, 17 if CUDA else 1, 16, 2),
] + [
    (name, QoSPolicy.BEST_EFFORT, 38 * PERCENT, None, 40 if CUDA else 5, 1, 1)
    for name in ("translator", "critic", "summary", "tagger", "judge", "poet")
]


@dataclass
class Model:
    """A model, its context, and how its requests went."""

    context: ExecutionContext
    net: LlamaForCausalLM
    prompts: torch.Tensor
    first: torch.Tensor | None = None
    requests: int = 0
    entering: float = 0.0

    def answer(self) -> torch.Tensor:
        """Generate two tokens for each prompt. The scores of all tokens at each step."""
        start = time.perf_counter()
        with context_session(self.context):
            self.entering = time.perf_counter() - start
            output = self.net.generate(
                self.prompts.to(DEVICE),
                max_new_tokens=2,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            scores = torch.stack(output.logits)
        # Kept outside of the session, so that no context is charged for it.
        return scores.to("cpu", copy=True)

    def is_right(self) -> bool:
        """Serve a request. Whether the answer is the same as the first one."""
        answer = self.answer()
        self.requests += 1
        if self.first is None:
            self.first = answer
        return torch.equal(answer, self.first)


def loaded(seed: int) -> Model:
    """Make a model inside of a context of its own."""
    name, tier, budget, base, layers, prompts, _ = MODELS[seed]
    context = create_context(name, budget, base_vram=base, qos=tier)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with context_session(context), torch.device(DEVICE):
        net = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Model(context, net, torch.randint(2, VOCABULARY, (prompts, 12)))


def table(models: list[Model]) -> Table:
    """Who is where now."""
    title = f"{UNIT}; times moved out and back; the last entering in ms; requests"
    result = Table("model", "tier", title=title, title_justify="left", box=None, pad_edge=False)
    for title in ("budget", "used", "device", "host", "out", "back", "ms", "asked"):
        result.add_column(title, justify="right")
    counts = {context.name: context for context in stats().contexts}
    for model in models:
        context, usage = model.context, model.context.usage()
        sizes = (usage.max, usage.used, usage.reserved, usage.evicted)
        result.add_row(
            context.name,
            context.qos.value,
            *(f"{size / SCALE:.4g}" for size in sizes),
            str(counts[context.name].evictions),
            str(counts[context.name].restores),
            f"{1e3 * model.entering:.1f}",
            str(model.requests),
        )
    return result


def serve(models: list[Model], console: Console) -> tuple[int, int]:
    """Serve all requests. How many were answered as the first time, and how many at all."""
    schedule = random.Random(0).choices(models, [each[-1] for each in MODELS], k=REQUESTS)
    right = answered = 0
    with Live(table(models), console=console, auto_refresh=False, transient=True) as live:
        for model in models + schedule:
            try:
                right += model.is_right()
                answered += 1
            except torch.OutOfMemoryError as error:
                console.print(f"{model.context.name} could not be served: {error}")
            live.update(table(models), refresh=True)
    return right, answered


def main() -> None:
    """Load the models, serve the requests, and say what happened."""
    console = Console()
    initialize(device=DEVICE, total_vram=CAPACITY, host_backup=3 * CAPACITY)
    torch.set_default_dtype(DTYPE)
    models = [loaded(seed) for seed in range(len(MODELS))]
    needed = sum(model.context.usage().used for model in models)
    print(f"{len(models)} models of {needed / SCALE:.4g} {UNIT}, ", end="")
    print(f"{needed / CAPACITY:.1f} times the {CAPACITY / SCALE:.0f} {UNIT} of the device")
    right, answered = serve(models, console)
    console.print(table(models))
    print(f"identical answers: {right} of {answered}")
    models.clear()
    for context in list_contexts():
        context.destroy()
    shutdown()
    if right != answered:
        sys.exit(1)


if __name__ == "__main__":
    main()
