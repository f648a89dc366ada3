"""Pins by a tensor, and what importing the package asks of the CUDA driver."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import MB, ContextBusyError, context_session, create_context


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    pgk.initialize(device="cpu", total_vram=64 * MB, host_backup=128 * MB)
    yield
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()


def test_a_tensor_pins_its_context() -> None:
    context = create_context("a", 32 * MB)
    with context_session(context):
        x = torch.ones(8 * MB, dtype=torch.uint8)
    context.evict()
    assert context.usage().evicted >= 8 * MB
    with pgk.pin(x[5:].view(torch.int8)):
        assert context.usage().evicted == 0
        with pytest.raises(ContextBusyError, match="is pinned"):
            context.evict()
    context.evict()
    assert x.min() == x.max() == 1


def test_a_tensor_pins_what_a_destroyed_context_left() -> None:
    context, other = create_context("a", 48 * MB), create_context("b", 64 * MB)
    with context_session(context):
        x = torch.ones(40 * MB, dtype=torch.uint8)
    context.destroy()
    pin = pgk.pin(x)

    def evicted() -> int:
        return {one.name: one for one in pgk.stats().contexts}["a"].usage.evicted

    with context_session(other):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(40 * MB, dtype=torch.uint8)
        assert evicted() == 0
        pin.release()
        y = torch.full((40 * MB,), 2, dtype=torch.uint8)
    assert evicted() > 0
    del y
    other.destroy()
    with pgk.pin(x):
        assert evicted() == 0
    assert x.min() == x.max() == 1


def test_what_cannot_be_pinned() -> None:
    with pytest.raises(ValueError, match="belongs to no context"):
        pgk.pin(torch.ones(3))
    with pytest.raises(TypeError, match="expected a tensor"):
        pgk.pin("x")  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [None, "1"])
def test_what_is_set_is_left_alone(before: str | None) -> None:
    """Without a driver there is nobody to ask for more hardware queues."""
    environment = {
        name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"
    }
    if before is not None:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = before
    program = "import os, pygpukit_torch; print(os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'))"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    expected = {before} if before is not None or not torch.cuda.is_available() else {None, "32"}
    assert result.stdout.strip() in {str(value) for value in expected}
