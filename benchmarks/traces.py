"""What the fragmentation story replays: traces of torch programs, recorded when they are needed.

The models have the sizes of real ones. They run on the meta device, where tensors have shapes and
lifetimes but no memory, so recording takes seconds and is the same on every machine. Lengths,
batches and resolutions are drawn from a fixed seed.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, DynamicCache, LlamaForCausalLM

from benchmarks.llama import llama_config
from pygpukit_torch import KB, MB
from pygpukit_torch.recording import record
from pygpukit_torch.trace import Allocation, Event, Free, Trace

Step = Callable[[], None]


def recorded(program: Callable[[int], None], steps: int) -> Trace:
    """Return what ``program(steps)`` allocates, with bf16 models."""
    with bf16(), torch.device("meta"), record("meta") as recording:
        program(steps)
    return recording.trace


@contextmanager
def bf16() -> Iterator[None]:
    """Make bf16 the default of new tensors."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def generation(steps: int) -> None:
    """Serve four requests of mixed lengths in turns; their caches grow beside each other."""
    choice = random.Random(1)
    model = _llama()
    requests: list[Iterator[None]] = []
    for _ in range(steps):
        if len(requests) < 4:
            requests.append(_request(model, choice))
        turn = requests[choice.randrange(len(requests))]
        if next(turn, turn) is turn:
            requests.remove(turn)


def training(steps: int) -> None:
    """Train an encoder with AdamW on batches of every shape."""
    choice = random.Random(2)
    model = _bert()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        shape = choice.choice((4, 8, 12, 16)), choice.randrange(32, 513)
        ids = torch.zeros(shape, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.device("cpu"):  # of its counter of steps, which it reads
            optimizer.step()
        optimizer.zero_grad()


def diffusion(steps: int) -> None:
    """Denoise images of changing resolutions, several steps each, and decode them."""
    choice = random.Random(3)
    unet, decoder = _UNet(320).eval(), _Decoder(128).eval()
    with torch.no_grad():
        for _ in range(steps):
            height, width = (choice.choice((48, 64, 80, 96, 112, 128)) for _ in range(2))
            latent = torch.empty(2, 4, height, width)
            for _ in range(3):
                latent = latent + unet(latent)
            decoder(latent[:1])


def three_models(steps: int) -> None:
    """Let a language model, an encoder and an image model take turns in one process."""
    choice = random.Random(4)
    llama, bert, images = _llama(), _bert().eval(), _Decoder(96).eval()
    requests: list[Iterator[None]] = []
    with torch.no_grad():
        for _ in range(steps):
            if len(requests) < 2:
                requests.append(_request(llama, choice))
            for turn in list(requests):
                if next(turn, turn) is turn:
                    requests.remove(turn)
            if choice.random() < 0.3:
                shape = choice.randrange(1, 33), choice.randrange(16, 257)
                bert(input_ids=torch.zeros(shape, dtype=torch.long))
            if choice.random() < 0.2:
                images(torch.empty(1, 4, *(choice.randrange(32, 97) for _ in range(2))))


def adversarial(steps: int) -> Trace:
    """Return a trace whose blocks never fit the holes that others have left.

    In every round half of the blocks are freed, every other one, and blocks a little larger than
    the holes take their place; between them small ones stay for a long time.
    """
    choice = random.Random(5)
    events: list[Event] = []
    count = 0
    live: list[int] = []
    size = 2 * MB

    def allocate(size: int) -> int:
        nonlocal count
        events.append(Allocation(size))
        count += 1
        return count - 1

    for turn in range(steps):
        held = 0
        while held < 512 * MB:
            live.append(allocate(size))
            held += size
            if choice.random() < 0.2:
                live.append(allocate(choice.randrange(1, 64) * KB))
        events += [Free(number) for number in live[::2]]
        live = live[1::2]
        # Few enough to stay below the same peak.
        drop = [number for number in live if choice.random() < 0.5]
        events += [Free(number) for number in drop]
        live = [number for number in live if number not in set(drop)]
        size += size // 8 + 512 * (turn % 3 + 1)
    return Trace(tuple(events))


# Models -----------------------------------------------------------------------------------------


def _llama() -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM(llama_config(4096, 4)).eval()
    return model


@torch.no_grad()
def _request(model: LlamaForCausalLM, choice: random.Random) -> Iterator[None]:
    """Prefill one request, then decode it token by token."""
    length = choice.randrange(64, 2048)
    new_tokens = choice.randrange(16, 64)
    cache = DynamicCache(config=model.config)
    for tokens in (length, *[1] * new_tokens):
        ids = torch.zeros((1, tokens), dtype=torch.long)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield


def _bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(num_hidden_layers=6))


class _Block(nn.Module):
    """What U-Nets and image decoders are made of."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(32, channels_in),
            nn.SiLU(),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
        )
        self.second = nn.Sequential(
            nn.GroupNorm(32, channels_out),
            nn.SiLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
        )
        self.skip = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.skip(x) + self.second(self.first(x))
        return output


class _UNet(nn.Module):
    """A U-Net of three levels, as in latent diffusion."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels, channels * 2, channels * 4]
        self.begin = nn.Conv2d(4, channels, 3, padding=1)
        inputs = [channels, *widths[:-1]]
        self.down = nn.ModuleList(_Block(*pair) for pair in zip(inputs, widths, strict=True))
        self.middle = _Block(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            _Block(2 * width, target)
            for width, target in zip(reversed(widths), reversed(inputs), strict=True)
        )
        self.end = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], dim=1))
        output: torch.Tensor = self.end(x)
        return output


class _Decoder(nn.Module):
    """From latents to images of eight times the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels * 4, channels * 2, channels]
        self.begin = nn.Conv2d(4, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            _Block(*pair) for pair in zip([widths[0], *widths[:-1]], widths, strict=True)
        )
        self.end = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(nn.functional.interpolate(x, scale_factor=2.0))
        output: torch.Tensor = self.end(x)
        return output
