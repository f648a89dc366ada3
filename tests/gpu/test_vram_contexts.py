"""The core over VRAM: budgets, physical reservations, contents, failures, random programs."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from pygpukit_torch import DeviceError, native
from pygpukit_torch.native import Device, Tier
from tests.device_memory import DeviceMemory

MB = 1 << 20
GB = 1 << 30


def free_vram() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


def test_the_device_knows_its_size_and_priorities() -> None:
    device = native.CudaDevice()
    total = torch.cuda.get_device_properties(0).total_memory
    assert total - 2 * MB < device.capacity <= total
    assert device.granularity == 2 * MB
    with pytest.raises(ValueError, match="is not between one page"):
        native.CudaDevice(0, total + GB)
    with pytest.raises(DeviceError, match="cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        native.CudaDevice(99)


def test_a_reservation_is_vram_that_nobody_else_gets(device: native.CudaDevice) -> None:
    manager = native.Manager(device)
    before = free_vram()
    context = manager.create_context("a", 2 * GB, 2 * GB, Tier.guaranteed)
    reserved = before - free_vram()
    assert 2 * GB <= reserved <= 2 * GB + 64 * MB
    block = context.allocate(2 * GB)
    assert before - free_vram() <= reserved + 64 * MB
    context.free(block)
    manager.destroy_context(context)
    assert before - free_vram() <= 64 * MB
    manager.check_invariants()


def test_kernels_of_torch_work_in_a_contexts_memory(device: native.CudaDevice) -> None:
    """Torch's tensors over an arena's address, on a context's stream."""
    manager = native.Manager(device)
    context = manager.create_context("a", GB)
    block = context.allocate(64 * MB)

    view = SimpleNamespace(
        __cuda_array_interface__={
            "shape": (16 * MB,),
            "typestr": "<f4",
            "data": (block, False),
            "version": 3,
        }
    )
    tensor = torch.as_tensor(view, device="cuda")
    assert tensor.data_ptr() == block
    stream = torch.cuda.ExternalStream(context.stream)
    with torch.cuda.stream(stream):
        tensor.fill_(2)
        total = (tensor @ tensor).item()
    assert total == 4 * 16 * MB
    event = device.record(context.stream)
    device.synchronize_event(event)
    assert device.is_done(event)
    context.free(block)


def test_streams_are_recycled_not_destroyed(device: native.CudaDevice) -> None:
    first = device.create_stream(-1)
    device.destroy_stream(first)
    with pytest.raises(ValueError, match="no stream"):
        device.record(first)
    assert device.create_stream(-1) == first
    assert torch.cuda.ExternalStream(first).priority == -1
    assert device.create_stream(-1) != first


def test_a_stream_with_unfinished_work_cannot_be_given_back(device: native.CudaDevice) -> None:
    stream = device.create_stream()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        torch.cuda._sleep(200_000_000)
    event = device.record(stream)
    assert not device.is_done(event)
    with pytest.raises(RuntimeError, match="unfinished work"):
        device.destroy_stream(stream)
    device.synchronize_event(event)
    device.destroy_stream(stream)


def test_map_calls_do_not_break_a_capture(device: native.CudaDevice) -> None:
    """Torch captures in global mode: unsafe calls are forbidden to threads that do not relax it."""
    manager = native.Manager(device)
    graph = torch.cuda.CUDAGraph()
    value = torch.ones(1000, device="cuda")
    with torch.cuda.graph(graph):
        result = value * 2
        context = manager.create_context("a", GB)
        block = context.allocate(100 * MB)
        context.free(block)
        manager.destroy_context(context)
    graph.replay()
    torch.cuda.synchronize()
    assert (result == 2).all()
    manager.check_invariants()


@pytest.mark.parametrize("call", ["create", "map", "unmap", "release", "reserve", "create_stream"])
def test_failures_lose_nothing(device: native.CudaDevice, call: str) -> None:
    before = free_vram()
    manager = native.Manager(device)
    device.inject_fault(2, Device.Call.__members__[call])
    contexts: list[native.Context] = []
    for index in range(3):
        try:
            context = manager.create_context(f"c{index}", GB, 256 * MB)
            contexts.append(context)
            context.free(context.allocate(600 * MB))
        except (DeviceError, torch.OutOfMemoryError) as error:
            assert "injected fault" in str(error)  # noqa: PT017
        manager.check_invariants()
    for context in contexts:
        manager.destroy_context(context)
    device.inject_fault(0)
    manager.destroy_context(manager.create_context("last", 2 * MB))
    manager.check_invariants()
    assert before - free_vram() <= 64 * MB


def test_a_random_program_keeps_books_and_bytes(device: native.CudaDevice) -> None:
    manager, vram, choice = native.Manager(device), DeviceMemory(device), random.Random(11)
    contexts = [
        manager.create_context("guaranteed", GB, GB, Tier.guaranteed),
        manager.create_context("burstable", 3 * GB, 512 * MB),
        manager.create_context("small", 64 * MB),
        manager.create_context("best effort", 4 * GB, 0, Tier.best_effort),
    ]
    live: list[tuple[native.Context, int, int, bytes]] = []
    refused = 0
    for step in range(4000):
        if live and choice.random() < 0.48:
            context, address, size, mark = live.pop(choice.randrange(len(live)))
            assert vram.read(address, 8) == mark
            assert vram.read(address + size - 8, 8) == mark
            context.free(address)
            continue
        context = choice.choice(contexts)
        size = int(2 ** choice.uniform(4, 29))
        try:
            address = context.allocate(size)
        except torch.OutOfMemoryError:
            refused += 1
            continue
        mark = step.to_bytes(8, "little")
        vram.write(address + size - 8, mark)
        vram.write(address, mark)
        if size >= 16:
            live.append((context, address, size, mark))
        else:
            context.free(address)
        if step % 200 == 0:
            manager.check_invariants()
    assert refused > 0
    for context, address, _, mark in live:
        assert vram.read(address, 8) == mark
        context.free(address)
    for context in contexts:
        manager.destroy_context(context)
    manager.check_invariants()
