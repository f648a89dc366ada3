"""What is asked before others give way: memory of the device that its holder can do without.

Here it is a handle of the device that no context has, as torch's cache is on a GPU.
"""

import threading
from collections.abc import Callable

import pytest
import torch

from pygpukit_torch import AdmissionError, DeviceError, native
from pygpukit_torch.native import Tier

MB = 1 << 20
MIDDLE, HIGH = Tier.burstable, Tier.guaranteed


class Cache:
    """Memory that somebody else has on the device until he is asked for it."""

    def __init__(self, device: native.Device, size: int) -> None:
        self.device = device
        self.handle: native.Handle | None = device.create(size)
        self.asked: list[bool] = []

    def __call__(self, device_is_short: bool) -> bool:
        self.asked.append(device_is_short)
        handle, self.handle = self.handle, None
        if handle is None:
            return False
        self.device.release(handle)
        return True


@pytest.fixture
def device() -> native.HostDevice:
    return native.HostDevice(64 * MB)


@pytest.fixture
def manager(device: native.HostDevice) -> native.Manager:
    return native.Manager(device, host_backup=256 * MB, claim_timeout=0.5)


def test_a_cache_goes_before_live_data_of_others(
    device: native.HostDevice, manager: native.Manager
) -> None:
    other = manager.create_context("other", 32 * MB)
    block = other.allocate(16 * MB)
    cache = Cache(device, 32 * MB)
    manager.set_reliefs([cache])
    wants = manager.create_context("wants", 48 * MB)
    kept = wants.allocate(40 * MB)
    assert cache.asked == [True]
    assert manager.usage(other).evicted == 0
    second = wants.allocate(8 * MB)  # fits without anybody
    assert cache.asked == [True]
    for context, address in ((wants, kept), (wants, second), (other, block)):
        context.free(address)


def test_they_are_asked_in_their_order_and_others_only_then(
    device: native.HostDevice, manager: native.Manager
) -> None:
    other = manager.create_context("other", 32 * MB)
    block = other.allocate(24 * MB)
    order: list[str] = []

    def named(name: str, relief: Callable[[bool], bool]) -> Callable[[bool], bool]:
        def ask(device_is_short: bool) -> bool:
            order.append(name)
            return relief(device_is_short)

        return ask

    small, large = Cache(device, 4 * MB), Cache(device, 28 * MB)
    manager.set_reliefs(
        [named("nothing", lambda _: False), named("small", small), named("large", large)]
    )
    wants = manager.create_context("wants", 48 * MB)
    first = wants.allocate(8 * MB)  # all that is free
    second = wants.allocate(4 * MB)
    assert order == ["nothing", "small"]
    third = wants.allocate(28 * MB)
    assert order == ["nothing", "small", "nothing", "small", "large"]
    assert manager.usage(other).evicted == 0
    fourth = wants.allocate(8 * MB)
    assert order[5:] == ["nothing", "small", "large"]
    assert manager.usage(other).evicted > 0
    for context, address in ((wants, first), (wants, second), (wants, third), (wants, fourth)):
        context.free(address)
    other.free(block)


@pytest.mark.parametrize("way", ["entering", "restoring"])
def test_a_context_comes_back_beside_a_cache(
    device: native.HostDevice, manager: native.Manager, way: str
) -> None:
    context = manager.create_context("back", 40 * MB)
    other = manager.create_context("other", 8 * MB)
    block, stays = context.allocate(32 * MB), other.allocate(8 * MB)
    manager.evict_context(context)
    manager.trim()
    cache = Cache(device, 48 * MB)
    manager.set_reliefs([cache])
    if way == "entering":
        manager.pin(context)  # enters it
        manager.unpin(context)
    else:
        manager.restore_context(context)
    assert manager.usage(context).evicted == manager.usage(other).evicted == 0
    assert cache.asked == [True]
    context.free(block)
    other.free(stays)


def test_a_reservation_gets_what_a_cache_holds(
    device: native.HostDevice, manager: native.Manager
) -> None:
    cache = Cache(device, 48 * MB)
    with pytest.raises(AdmissionError):
        manager.create_context("reserves", 32 * MB, 32 * MB, HIGH)
    manager.set_reliefs([cache])
    context = manager.create_context("reserves", 32 * MB, 32 * MB, HIGH)
    assert cache.asked == [True]
    other = manager.create_context("other", 24 * MB, 8 * MB)
    second = Cache(device, 24 * MB)
    manager.set_reliefs([second])
    manager.resize_context(other, 24 * MB, 24 * MB)
    assert second.asked == [True]
    with pytest.raises(AdmissionError):  # promised to others: no cache is in the way
        manager.create_context("too much", 32 * MB, 32 * MB, HIGH)
    assert second.asked == [True]
    assert manager.usage(context).base == 32 * MB


def test_who_is_over_its_budget_gets_its_own_memory_back_and_no_cache_is_emptied(
    manager: native.Manager,
) -> None:
    context = manager.create_context("small", 16 * MB)
    block = context.allocate(12 * MB)
    asked: list[bool] = []

    def give_back(device_is_short: bool) -> bool:
        asked.append(device_is_short)
        context.free(block)
        return True

    manager.set_reliefs([give_back])
    again = context.allocate(12 * MB)
    assert asked == [False]
    manager.set_reliefs([])
    with pytest.raises(torch.OutOfMemoryError):
        context.allocate(12 * MB)
    context.free(again)


def test_what_a_relief_needs_itself_is_not_relieved(
    device: native.HostDevice, manager: native.Manager
) -> None:
    context = manager.create_context("wants", 48 * MB)
    cache = Cache(device, 40 * MB)
    refused: list[str] = []

    def needs_memory(device_is_short: bool) -> bool:
        try:
            context.allocate(32 * MB)
        except torch.OutOfMemoryError as error:
            refused.append(str(error))
        return cache(device_is_short)

    manager.set_reliefs([needs_memory])
    block = context.allocate(32 * MB)
    assert len(refused) == 1
    context.free(block)


def test_a_relief_that_fails_leaves_everything_usable(
    device: native.HostDevice, manager: native.Manager
) -> None:
    context = manager.create_context("wants", 48 * MB)
    cache = Cache(device, 40 * MB)

    def fail(device_is_short: bool) -> bool:
        raise RuntimeError("no")

    manager.set_reliefs([fail])
    with pytest.raises(RuntimeError, match="no"):
        context.allocate(32 * MB)
    manager.set_reliefs([cache])
    context.free(context.allocate(32 * MB))
    manager.check_invariants()


def test_threads_share_what_a_cache_gives_while_contexts_come_and_go(
    device: native.HostDevice, manager: native.Manager
) -> None:
    lock = threading.Lock()
    caches: list[native.Handle] = []

    def give(device_is_short: bool) -> bool:
        with lock:
            handles = caches[:]
            caches.clear()
        for handle in handles:
            device.release(handle)
        return bool(handles)

    manager.set_reliefs([give])
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def fill_caches() -> None:
        start.wait(10)
        for _ in range(100):
            try:
                handle = device.create(8 * MB)
            except DeviceError:
                give(True)
                continue
            with lock:
                caches.append(handle)

    def work(name: str) -> None:
        try:
            context = manager.create_context(name, 12 * MB)
            start.wait(10)
            for turn in range(100):
                block = context.allocate(8 * MB)
                if turn % 10 == 0:
                    manager.evict_context(context)
                    manager.pin(context)
                    manager.unpin(context)
                context.free(block)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"{i}",)) for i in range(3)]
    threads.append(threading.Thread(target=fill_caches))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    give(True)
    manager.check_invariants()
