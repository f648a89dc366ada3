"""Two models on one thread and one event loop: do their kernels run at the same time?

Each task submits its model's work in its own context and awaits it. The profiler tells when each
kernel ran; ``benchmarks/plots.py`` draws it.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pygpukit_torch as pgk
from benchmarks.report import Report
from pygpukit_torch import GB, context_session


class Heads(nn.Module):
    """Large inputs, small outputs: its kernels take long, and half of an H100's SMs."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8192, 512, bias=False) for _ in range(count))

    def forward(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Apply all heads to ``data``, of shape (n, 8192)."""
        return [head(data) for head in self.heads]


def run(quick: bool) -> Report:
    """Measure. ``quick`` runs fewer rounds."""
    pgk.initialize(device="cuda", total_vram=8 * GB)
    contexts = {name: pgk.create_context(name, 4 * GB) for name in ("a", "b")}
    models = {name: contexts[name].place(Heads(6)) for name in contexts}
    rounds = 2 if quick else 4

    async def work(name: str) -> None:
        with torch.inference_mode():
            async with context_session(contexts[name]) as session:
                data = torch.ones(1024, 8192, device="cuda")
                for _ in range(rounds):
                    models[name](data)
                    await session.synchronize()

    async def main() -> None:
        await asyncio.gather(*(work(name) for name in contexts))

    asyncio.run(main())
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        asyncio.run(main())
        torch.cuda.synchronize()
    report = Report("overlap", "microseconds", ["kernel", "stream", "start", "duration"])
    report.rows = _kernels(profiler)
    report.machine["overlapped"] = f"{_overlap(report.rows):.0%}"
    models.clear()
    for context in contexts.values():
        context.destroy()
    pgk.shutdown()
    return report


def _kernels(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = sorted(
        (event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"]
    )
    start = kernels[0]["ts"]
    return [
        {
            "kernel": event["name"][:60],
            "stream": event["args"]["stream"],
            "start": round(event["ts"] - start, 1),
            "duration": round(event["dur"], 1),
        }
        for event in kernels
    ]


def _overlap(kernels: list[dict[str, Any]]) -> float:
    """Of the time in which any stream is busy, the part in which two are."""
    edges = sorted(
        edge
        for kernel in kernels
        for edge in ((kernel["start"], 1), (kernel["start"] + kernel["duration"], -1))
    )
    busy = both = 0.0
    running, last = 0, 0.0
    for time, change in edges:
        busy += (time - last) * (running > 0)
        both += (time - last) * (running > 1)
        running, last = running + change, time
    return both / busy
