"""Tensors, graphs and modules of which it is known, exactly, what they must hold and give."""

from __future__ import annotations

import torch

from pygpukit_torch import ExecutionContext, context_session

COLUMNS = 4096


class Sheet:
    """A tensor and the sum that its words, weighted by rows, must have. One thread owns it."""

    def __init__(self, size: int, seed: int, origin: str, device: str) -> None:
        rows = max(1, size // (4 * COLUMNS))
        first = (torch.arange(rows) * 31 + seed) % 4093
        others = torch.arange(COLUMNS) * 17 % 4099
        weights = torch.arange(1, rows + 1)
        self.origin = origin
        self.expected = int((weights * (COLUMNS * first + others.sum())).sum())
        self._step = COLUMNS * int(weights.sum())
        self.data = first.int().to(device)[:, None] + others.int().to(device)

    def add(self, number: int) -> None:
        self.data.add_(number)
        self.expected += number * self._step

    def is_right(self) -> bool:
        weights = torch.arange(1, len(self.data) + 1, device=self.data.device)
        # In parts, since the host device makes a copy to sum them.
        parts = zip(self.data.chunk(8), weights.chunk(8), strict=True)
        totals = [(part.sum(1, dtype=torch.int64) * one).sum() for part, one in parts]
        total = int(torch.stack(totals).sum().item())
        return (total - self.expected) % 2**64 == 0


class Model:
    """What a context holds: sheets of weights, a graph and a module; all numbers are integers."""

    def __init__(
        self, context: ExecutionContext, sheets: int, size: int, seed: int, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-3, 4, shape, generator=generator).float()

        def make() -> torch.nn.Module:
            return torch.nn.Sequential(
                torch.nn.Linear(64, 1024, bias=False),
                torch.nn.ReLU(),
                torch.nn.Linear(1024, 8, bias=False),
            )

        module, x = make(), integers(128, 64)
        for parameter in module.parameters():
            parameter.data.copy_(integers(*parameter.shape))
        module(x).sum().backward()
        self.gradients = [p.grad for p in module.parameters() if p.grad is not None]
        inputs, w = [integers(512, 512) for _ in range(3)], integers(512, 512)
        self.results = [torch.relu(one @ w).sum(1) for one in inputs]
        self.context = context
        with context_session(context):
            self.weights = [Sheet(size, seed + n, context.name, device) for n in range(sheets)]
            self.module, self.x = make().to(device), x.to(device)
            self.module.load_state_dict(module.state_dict())
            self.inputs = [one.to(device) for one in inputs]
            self.graph = self._capture(w.to(device)) if device == "cuda" else None

    def _capture(self, w: torch.Tensor) -> torch.cuda.CUDAGraph:
        self.input, self.w = torch.zeros_like(w), w
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.relu(self.input @ w).sum(1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = torch.relu(self.input @ w).sum(1)
        return graph

    def replay(self, which: int) -> bool:
        assert self.graph is not None
        self.input.copy_(self.inputs[which])
        self.graph.replay()
        return torch.equal(self.output.cpu(), self.results[which])

    def forward(self) -> torch.Tensor:
        self.module.zero_grad(set_to_none=True)
        loss: torch.Tensor = self.module(self.x).sum()
        return loss

    def has_right_gradients(self) -> bool:
        found = [p.grad.cpu() for p in self.module.parameters() if p.grad is not None]
        return all(map(torch.equal, found, self.gradients)) and len(found) == len(self.gradients)
