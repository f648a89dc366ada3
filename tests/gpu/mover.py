"""Contexts that are sent out and brought back all the time, beside a test."""

from __future__ import annotations

import time

import torch

from pygpukit_torch import ContextBusyError, ExecutionContext, context_session


class Mover:
    """Sends contexts out and brings them back."""

    def __init__(self, *contexts: ExecutionContext) -> None:
        self.contexts = contexts
        self.durations: list[float] = []
        self.refused = 0

    def __call__(self) -> None:
        for context in self.contexts:
            start = time.perf_counter()
            try:
                context.evict()
                context.restore()
            except ContextBusyError:
                self.refused += 1
                time.sleep(0.001)
            else:
                self.durations.append(time.perf_counter() - start)

    def move_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self()
        print(f"\n{len(self.durations)} times out and in, {self.refused} refused")


def words(context: ExecutionContext, size: int) -> torch.Tensor:
    """Zeros in ``context``, and all that touches them is loaded, the mover's kernels as well."""
    with context_session(context):
        x = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
        x.add_(1)
        x.zero_()
    for _ in range(2):
        context.evict()
        context.restore()
    return x
