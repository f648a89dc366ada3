"""Training in a session: what autograd's own threads allocate is charged to the right context."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pygpukit_torch as pgk
from pygpukit_torch import GB, context_session, create_context

pytestmark = pytest.mark.usefixtures("check_invariants")


def native_allocations(*contexts: pgk.ExecutionContext) -> int:
    """Allocations that were no context's, since the beginning."""
    total = torch.cuda.memory_stats()["allocation.all.allocated"]
    return total - sum(context.memory_stats()["allocation.all.allocated"] for context in contexts)


class Net(torch.nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU()) for _ in range(4)
        )
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def train(checkpointed: bool, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = Net(checkpointed).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler()
    data = torch.randn(128, 256, device="cuda")
    losses = []
    for _ in range(steps):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = (model(data) - data).square().mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointed", [False, True])
def test_amp_and_checkpointing_charge_their_context_only(checkpointed: bool) -> None:
    outside = train(checkpointed, 10)
    context, bystander = create_context("train", GB), create_context("bystander", GB)
    before = native_allocations(context, bystander)
    with context_session(context):
        inside = train(checkpointed, 10)
    assert inside == pytest.approx(outside, rel=1e-3)
    assert inside[-1] < inside[0]
    assert native_allocations(context, bystander) == before
    assert context.memory_stats()["allocation.all.allocated"] > 500
    assert bystander.usage().peak == 0


@pytest.mark.parametrize("where", ["outside", "in another thread", "in another session"])
def test_gradients_are_charged_to_the_context_of_their_forward(where: str) -> None:
    context, other = create_context("forward", GB), create_context("other", GB)
    with context_session(context):
        model = Net(checkpointed=False).cuda()
        loss = model(torch.randn(128, 256, device="cuda")).square().mean()
    before = native_allocations(context, other)
    counted = other.memory_stats()["allocation.all.allocated"]

    if where == "outside":
        loss.backward()
    elif where == "in another thread":
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    else:
        with context_session(other):
            loss.backward()
    torch.cuda.synchronize()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert context._native.block_bytes(parameter.grad.data_ptr())
    # The root gradient, a scalar, is made by the caller.
    assert native_allocations(context, other) - before <= 1
    assert other.memory_stats()["allocation.all.allocated"] - counted <= 1


def test_backward_called_in_a_session_of_a_forward_outside_is_the_callers() -> None:
    context = create_context("caller", GB)
    model = Net(checkpointed=False).cuda()
    loss = model(torch.randn(128, 256, device="cuda")).square().mean()
    before = native_allocations(context)
    with context_session(context):
        loss.backward()
    torch.cuda.synchronize()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert context._native.block_bytes(parameter.grad.data_ptr())
    assert native_allocations(context) == before


def test_a_forward_on_a_side_stream_of_a_session() -> None:
    context = create_context("a", GB)
    side = torch.cuda.Stream()
    with context_session(context):
        model = Net(checkpointed=False).cuda()
        data = torch.randn(128, 256, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = model(data).square().mean()
        torch.cuda.current_stream().wait_stream(side)
        before = native_allocations(context)
        loss.backward()
        torch.cuda.synchronize()
    assert native_allocations(context) == before


def test_hooks_that_allocate_are_in_the_context() -> None:
    context = create_context("a", GB)
    seen: list[bool] = []
    with context_session(context):
        model = Net(checkpointed=False).cuda()
        loss = model(torch.randn(128, 256, device="cuda")).square().mean()

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        extra = torch.ones_like(gradient)
        seen.append(context._native.block_bytes(extra.data_ptr()) > 0)
        return gradient * extra

    for parameter in model.parameters():
        parameter.register_hook(hook)
    loss.backward()
    torch.cuda.synchronize()
    assert seen == [True] * len(list(model.parameters()))
