"""LLM, TTS and vision on one event loop and one thread, each in its own context.

The guide's complete example, with stand-ins of a few layers for the models. Each model submits its
work and awaits it; meanwhile the others go on. On a GPU their kernels overlap.
"""

import asyncio

import torch
from torch import nn

from pygpukit_torch.scheduler import (
    MB,
    context_session,
    create_context,
    current_context,
    get_context_usage,
    initialize,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

initialize(device=DEVICE, total_vram=1024 * MB)

llm_ctx = create_context("llm", max_vram=256 * MB)
tts_ctx = create_context("tts", max_vram=128 * MB)
vision_ctx = create_context("vision", max_vram=128 * MB)


def build(context, model: nn.Module) -> nn.Module:
    """Bring a model into a context."""
    return context.place(model.eval().requires_grad_(False))


llm = build(llm_ctx, nn.Sequential(*[nn.TransformerEncoderLayer(256, 4) for _ in range(4)]))
tts = build(tts_ctx, nn.Sequential(nn.Conv1d(256, 256, 9, padding=4), nn.ReLU(), nn.Flatten()))
vision = build(vision_ctx, nn.Sequential(nn.Conv2d(3, 128, 9, stride=2), nn.ReLU(), nn.Flatten()))
log: list[str] = []


async def run_model(model: nn.Module, *shape: int, rounds: int) -> torch.Tensor:
    """Submit a round of work and await it, as often as told."""
    session = context_session(current_context())
    for step in range(rounds):
        result = model(torch.ones(shape, device=DEVICE))
        log.append(f"{current_context().name} {step}")
        # The GPU is busy with this model; the event loop is not.
        await session.synchronize()
        await asyncio.sleep(0)
    return result


async def generate_response(user_input: str) -> str:
    """Stand in for an LLM."""
    await run_model(llm, 16, 1, 256, rounds=4)
    return f"A story about {user_input!r}"


async def analyze_images(user_input: str) -> str:
    """Stand in for a vision model."""
    features = await run_model(vision, 1, 3, 64, 64, rounds=4)
    return f"{features.numel()} features"


async def synthesize_speech(text: str) -> torch.Tensor:
    """Stand in for a speech model."""
    return await run_model(tts, 1, 256, len(text), rounds=2)


async def process_request(user_input: str) -> dict:
    """Process a user's request with several models."""

    async def llm_task():
        async with context_session(llm_ctx):
            return await generate_response(user_input)

    async def vision_task():
        async with context_session(vision_ctx):
            return await analyze_images(user_input)

    async def tts_task(text):
        async with context_session(tts_ctx):
            return await synthesize_speech(text)

    # LLM and vision in parallel, then speech from what both said.
    text_response, image_analysis = await asyncio.gather(llm_task(), vision_task())
    combined_text = f"{text_response}. {image_analysis}"
    return {"text": combined_text, "audio": await tts_task(combined_text)}


result = asyncio.run(process_request("this image"))
print("order    ", ", ".join(log))
print("text     ", result["text"])
print("audio    ", tuple(result["audio"].shape), "on", result["audio"].device)
for context in (llm_ctx, tts_ctx, vision_ctx):
    usage = get_context_usage(context)
    print(f"{context.name:9} used {usage.used / MB:5.1f} MiB, peak {usage.peak / MB:5.1f} MiB")
