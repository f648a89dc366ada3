"""Memory pools on every device there is: reuse, quota, eviction, tensors, and what may fail."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import DeviceError, native
from pygpukit_torch.native import Device, MemoryBlock, MemoryPool
from tests.device_memory import DeviceMemory

KB = 1 << 10
MB = 1 << 20
CAPACITY = 32 * MB

DEVICES: dict[str, Callable[[], Device]] = {"host": lambda: native.HostDevice(CAPACITY)}
if torch.cuda.is_available():
    DEVICES["cuda"] = lambda: native.CudaDevice(0, CAPACITY)


@pytest.fixture(params=list(DEVICES))
def device(request: pytest.FixtureRequest) -> Device:
    return DEVICES[request.param]()


@pytest.fixture
def memory(device: Device) -> DeviceMemory:
    return DeviceMemory(device)


@pytest.fixture
def pool(device: Device) -> Iterator[MemoryPool]:
    """8 MiB with eviction."""
    pool = MemoryPool(8 * MB, True, device)
    yield pool
    pool.check_invariants()


def figures(pool: MemoryPool) -> dict[str, int]:
    stats = pool.stats()
    return {name: getattr(stats, name) for name in dir(stats) if not name.startswith("_")}


def evicted(*blocks: MemoryBlock) -> list[bool]:
    return [block.is_evicted for block in blocks]


# Allocating and freeing --------------------------------------------------------------------------


def test_a_block_is_memory(pool: MemoryPool, memory: DeviceMemory) -> None:
    first, second = pool.allocate(4096), pool.allocate(5000)
    assert (first.size, second.size) == (4096, 5000)
    assert first.id != second.id
    memory.write(first.ptr, b"a" * 4096)
    memory.write(second.ptr, b"b" * 5000)
    assert memory.read(first.ptr, 4096) == b"a" * 4096
    assert memory.read(second.ptr, 5000) == b"b" * 5000


def test_a_freed_block_is_reused_whole_by_its_class_only(pool: MemoryPool) -> None:
    block = pool.allocate(4096)
    address = block.ptr
    pool.free(block)
    assert (pool.stats().cached, pool.stats().free_blocks) == (4096, 1)
    other = pool.allocate(2048)
    assert pool.stats().reuse_count == 0
    again = pool.allocate(3585)
    assert again.ptr == address != other.ptr
    assert again.id != block.id
    stats = pool.stats()
    assert (stats.reuse_count, stats.free_blocks, stats.cached) == (1, 0, 0)


@pytest.mark.parametrize(
    ("size", "occupied"),
    [
        (1, 512),
        (513, 1024),
        (2048, 2048),
        (2049, 2560),
        (4096, 4096),
        (4097, 5 * KB),
        (MB + 1, MB + 256 * KB),
        (7 * MB, 7 * MB),
        (7 * MB + 1, 8 * MB),  # which is the quota as well
    ],
)
def test_sizes_are_rounded_up_to_a_quarter_of_a_power_of_two(
    pool: MemoryPool, size: int, occupied: int
) -> None:
    pool.allocate(size)
    stats = pool.stats()
    assert (stats.used, stats.allocated_bytes) == (occupied, size)
    assert occupied <= size * 1.25 or occupied - size < 512


def test_the_largest_class_is_the_quota(device: Device) -> None:
    pool = MemoryPool(5 * MB + 600 * KB + 7, True, device)
    pool.free(pool.allocate(5 * MB + 1))
    assert pool.stats().cached == 5 * MB + 600 * KB
    pool.allocate(5 * MB + 600 * KB)
    assert pool.stats().reuse_count == 1
    with pytest.raises(MemoryError, match="rounded up"):
        pool.allocate(5 * MB + 600 * KB + 1)


def test_stats(pool: MemoryPool) -> None:
    assert figures(pool) == {
        **dict.fromkeys(figures(pool), 0),
        "quota": 8 * MB,
        "available": 8 * MB,
    }
    kept, freed, away = pool.allocate(3 * MB), pool.allocate(1000), pool.allocate(MB - 1)
    pool.free(freed)
    pool.evict(away)
    pool.touch(kept)
    assert figures(pool) == {
        "quota": 8 * MB,
        "used": 3 * MB,
        "cached": 1024,
        "available": 5 * MB,
        "allocated_bytes": 4 * MB - 1,
        "evicted_bytes": MB - 1,
        "resident": 4 * MB,
        "free_blocks": 1,
        "active_blocks": 2,
        "allocation_count": 3,
        "reuse_count": 0,
        "eviction_count": 1,
    }


def test_memory_comes_from_the_device_and_goes_back(device: Device) -> None:
    before = device.count(Device.Call.create)
    pool = MemoryPool(CAPACITY, device=device)
    assert device.count(Device.Call.create) == before
    block = pool.allocate(CAPACITY)
    with pytest.raises(DeviceError, match="out of memory"):
        device.create(2 * MB)
    pool.free(block)
    assert pool.stats().resident == CAPACITY
    pool.clear()
    assert pool.stats().resident == 0
    device.release(device.create(CAPACITY))


# What is refused ---------------------------------------------------------------------------------


def test_blocks_are_freed_once(pool: MemoryPool) -> None:
    block = pool.allocate(100)
    pool.free(block)
    for use in (pool.free, pool.touch, pool.evict, pool.restore, MemoryBlock.as_tensor):
        with pytest.raises(ValueError, match=f"block {block.id} was freed already"):
            use(block)
    assert (block.ptr, block.is_evicted, block.size) == (0, False, 100)


def test_blocks_of_another_pool_are_refused(pool: MemoryPool, device: Device) -> None:
    pool.allocate(100)
    block = MemoryPool(MB, True, device).allocate(100)
    for use in (pool.free, pool.touch, pool.evict, pool.restore):
        with pytest.raises(ValueError, match=f"block {block.id} belongs to another pool"):
            use(block)


@pytest.mark.parametrize("quota", [0, -1, CAPACITY + 1, 1 << 80])
def test_quotas_that_cannot_be(device: Device, quota: int) -> None:
    with pytest.raises(ValueError, match="quota"):
        MemoryPool(quota, device=device)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_cannot_be(pool: MemoryPool, size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be positive, got {size}"):
        pool.allocate(size)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_sizes_are_ints(pool: MemoryPool, value: Any) -> None:
    with pytest.raises(TypeError, match="size must be an int, got"):
        pool.allocate(value)
    with pytest.raises(TypeError, match="quota must be an int, got"):
        MemoryPool(value)


@pytest.mark.parametrize("value", [None, 1, object()])
def test_blocks_are_blocks(pool: MemoryPool, value: Any) -> None:
    for use in (pool.free, pool.touch, pool.evict, pool.restore):
        with pytest.raises(TypeError):
            use(value)


# Quota -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8 * MB + 1, 1 << 70])
def test_more_than_the_quota_is_refused(pool: MemoryPool, size: int) -> None:
    pool.allocate(MB)
    before = figures(pool)
    with pytest.raises(MemoryError, match=r"a block of .* does not fit: 1\.00 MiB of the quota"):
        pool.allocate(size)
    assert figures(pool) == before


def test_without_eviction_a_full_pool_refuses_and_says_why(device: Device) -> None:
    pool = MemoryPool(8 * MB, device=device)
    blocks = [pool.allocate(2 * MB) for _ in range(4)]
    before = figures(pool)
    with pytest.raises(
        MemoryError,
        match=r"memory pool on device '.*': a block of 600 B \(1\.00 KiB rounded up\) does not "
        r"fit: 8\.00 MiB of the quota of 8\.00 MiB are used, and eviction is not enabled",
    ):
        pool.allocate(600)
    assert figures(pool) == before
    pool.free(blocks[1])
    pool.allocate(600)
    pool.check_invariants()


def test_cached_blocks_of_other_classes_give_way_the_largest_first(device: Device) -> None:
    pool = MemoryPool(8 * MB, device=device)
    for size in (MB, 4 * MB, 2 * MB):
        pool.free(pool.allocate(size))
    assert pool.stats().cached == 7 * MB
    pool.allocate(3 * MB)
    assert (pool.stats().used, pool.stats().cached) == (3 * MB, 3 * MB)
    pool.allocate(5 * MB)
    assert (pool.stats().used, pool.stats().cached) == (8 * MB, 0)
    pool.check_invariants()


def test_pages_of_dropped_blocks_go_back_to_the_device(pool: MemoryPool) -> None:
    pool.free(pool.allocate(8 * MB))
    pool.allocate(MB)
    assert pool.stats().resident == 2 * MB


def test_a_pool_may_be_smaller_than_a_page(device: Device) -> None:
    pool = MemoryPool(1024, True, device)
    blocks = [pool.allocate(512) for _ in range(3)]
    assert evicted(*blocks) == [True, False, False]
    with pytest.raises(MemoryError):
        pool.allocate(1025)


# Eviction ----------------------------------------------------------------------------------------


def test_evicted_contents_come_back(pool: MemoryPool, memory: DeviceMemory) -> None:
    block = pool.allocate(3 * MB + 5)
    memory.write(block.ptr, b"begin" + bytes(3 * MB - 3) + b"end")
    pool.evict(block)
    assert (block.ptr, block.is_evicted) == (0, True)
    assert (pool.stats().used, pool.stats().resident) == (0, 0)
    pool.evict(block)
    assert pool.stats().eviction_count == 1
    other = pool.allocate(3 * MB)
    memory.write(other.ptr, b"x" * 3 * MB)
    pool.restore(block)
    assert not block.is_evicted
    assert memory.read(block.ptr, block.size) == b"begin" + bytes(3 * MB - 3) + b"end"


def test_an_evicted_block_can_be_freed(pool: MemoryPool) -> None:
    block = pool.allocate(MB)
    pool.evict(block)
    pool.free(block)
    stats = pool.stats()
    assert (stats.evicted_bytes, stats.allocated_bytes, stats.cached) == (0, 0, 0)


def test_the_least_recently_used_is_evicted(pool: MemoryPool) -> None:
    a, b, c, d = (pool.allocate(2 * MB) for _ in range(4))
    pool.touch(a)
    e = pool.allocate(2 * MB)
    assert evicted(a, b, c, d, e) == [False, True, False, False, False]
    pool.restore(b)
    assert evicted(a, b, c, d, e) == [False, False, True, False, False]
    pool.restore(d)  # in memory already: a use of it
    f = pool.allocate(4 * MB)
    assert evicted(a, b, c, d, e, f) == [True, False, True, False, True, False]
    pool.touch(c)
    assert c.is_evicted


def test_making_a_tensor_is_a_use(pool: MemoryPool) -> None:
    a, b = pool.allocate(4 * MB), pool.allocate(4 * MB)
    a.as_tensor()
    pool.allocate(MB)
    assert evicted(a, b) == [False, True]


def test_no_more_is_evicted_than_needed_and_cached_blocks_go_first(pool: MemoryPool) -> None:
    a, b, c = pool.allocate(2 * MB), pool.allocate(2 * MB), pool.allocate(MB)
    pool.free(pool.allocate(3 * MB))
    d = pool.allocate(2 * MB)
    assert evicted(a, b, c, d) == [False] * 4
    assert pool.stats().cached == 0
    e = pool.allocate(MB + 1)
    assert evicted(a, b, c, d, e) == [True, False, False, False, False]


def test_the_memory_of_an_evicted_block_of_the_class_is_handed_on(pool: MemoryPool) -> None:
    a, b = pool.allocate(4 * MB), pool.allocate(4 * MB)
    address, maps = a.ptr, pool.device.count(Device.Call.map)
    c = pool.allocate(4 * MB)
    assert evicted(a, b, c) == [True, False, False]
    assert c.ptr == address
    assert pool.device.count(Device.Call.map) == maps
    assert pool.stats().reuse_count == 1


def test_nothing_is_evicted_for_a_request_that_does_not_fit_anyway(pool: MemoryPool) -> None:
    a, b, c = pool.allocate(2 * MB), pool.allocate(3 * MB), pool.allocate(2 * MB)
    pool.free(pool.allocate(MB))
    pinned = b.as_tensor()
    before = figures(pool)
    with pytest.raises(
        MemoryError, match=r"7\.00 MiB of the quota of 8\.00 MiB are used, 4\.00 MiB of it by"
    ):
        pool.allocate(6 * MB)
    assert figures(pool) == before
    assert evicted(a, b, c) == [False] * 3
    del pinned
    pool.allocate(6 * MB)
    assert evicted(a, b, c) == [True] * 3


def test_restoring_without_room_is_refused_and_can_be_tried_again(device: Device) -> None:
    memory = DeviceMemory(device)
    pool = MemoryPool(4 * MB, device=device)
    block = pool.allocate(3 * MB)
    memory.write(block.ptr, b"kept")
    pool.evict(block)
    other = pool.allocate(2 * MB)
    for again in (lambda: pool.restore(block), block.as_tensor):
        with pytest.raises(MemoryError, match="does not fit"):
            again()
    assert block.is_evicted
    pool.free(other)
    pool.restore(block)
    assert memory.read(block.ptr, 4) == b"kept"


def test_work_that_may_use_the_memory_is_awaited() -> None:
    """Before it is copied out, and before it is reused, once for all that was freed before."""
    host = native.HostDevice(CAPACITY)
    pool = MemoryPool(8 * MB, True, host)

    def count() -> int:
        return host.count(Device.Call.synchronize)

    blocks = [pool.allocate(MB) for _ in range(4)]
    before = count()
    for block in blocks:
        pool.free(block)
    assert count() == before
    blocks = [pool.allocate(MB) for _ in range(4)]
    assert count() == before + 1

    stream = host.create_stream()
    host.hold(stream)
    host.record(stream)
    timer = threading.Timer(0.05, host.let_go, [stream])
    timer.start()
    pool.evict(blocks[0])
    assert host.is_idle(stream)
    timer.join()


# Tensors -----------------------------------------------------------------------------------------


def test_a_tensor_is_the_memory(pool: MemoryPool, memory: DeviceMemory, device: Device) -> None:
    block = pool.allocate(4096)
    tensor = block.as_tensor()
    assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == ((4096,), torch.uint8, block.ptr)
    assert tensor.device == torch.device("cpu" if device.name == "host" else device.name)
    memory.write(block.ptr, b"abcd")
    assert bytes(tensor[:4].tolist()) == b"abcd"
    tensor[:4] = 7
    if tensor.is_cuda:
        torch.cuda.synchronize()
    assert memory.read(block.ptr, 4) == b"\7\7\7\7"
    assert block.as_tensor(torch.int32)[0].item() == 0x07070707


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool])
def test_tensors_have_the_dtype_asked_for(pool: MemoryPool, dtype: torch.dtype) -> None:
    block = pool.allocate(1600)
    tensor = block.as_tensor(dtype=dtype).zero_()
    assert (tensor.dtype, tensor.nbytes) == (dtype, 1600)
    assert tensor.sum().item() == 0


def test_tensors_hold_whole_items(pool: MemoryPool) -> None:
    block = pool.allocate(1001)
    with pytest.raises(ValueError, match="1001 bytes does not hold whole items of 4 bytes"):
        block.as_tensor(torch.float32)
    assert block.as_tensor().numel() == 1001
    wrong: Any = "float32"
    with pytest.raises(TypeError):
        block.as_tensor(wrong)


def test_a_tensor_of_an_evicted_block_restores_it(pool: MemoryPool) -> None:
    block = pool.allocate(MB)
    block.as_tensor().fill_(3)
    pool.evict(block)
    assert block.as_tensor().eq(3).all()
    assert not block.is_evicted


def test_a_block_stays_where_it_is_as_long_as_a_tensor_lives(pool: MemoryPool) -> None:
    block, other = pool.allocate(4 * MB), pool.allocate(4 * MB)
    view = block.as_tensor().fill_(3)[5:10]
    pool.touch(other)
    with pytest.raises(ValueError, match="as long as a tensor uses it"):
        pool.evict(block)
    pool.allocate(4 * MB)
    assert evicted(block, other) == [False, True]
    assert view.tolist() == [3] * 5
    del view
    pool.evict(block)


def test_a_block_freed_with_a_tensor_is_given_back_with_the_last(pool: MemoryPool) -> None:
    block = pool.allocate(4 * MB)
    tensors = [block.as_tensor().fill_(9), block.as_tensor()]
    pool.free(block)
    assert (pool.stats().used, pool.stats().cached, pool.stats().active_blocks) == (4 * MB, 0, 0)
    pool.allocate(4 * MB).as_tensor().fill_(1)
    with pytest.raises(MemoryError):
        pool.allocate(8 * MB)
    assert tensors[1].eq(9).all()
    del tensors[0]
    assert (pool.stats().used, pool.stats().cached) == (8 * MB, 0)
    del tensors[0]
    assert (pool.stats().used, pool.stats().cached) == (4 * MB, 4 * MB)


def test_a_tensor_outlives_its_pool(device: Device) -> None:
    pool = MemoryPool(CAPACITY, device=device)
    tensor = pool.allocate(MB).as_tensor().fill_(5)
    pool.allocate(MB)
    del pool
    gc.collect()
    assert tensor.eq(5).all()
    del tensor
    device.release(device.create(CAPACITY))


def test_clear_frees_all_but_what_tensors_hold(pool: MemoryPool) -> None:
    held, away, plain = pool.allocate(MB), pool.allocate(MB), pool.allocate(MB)
    tensor = held.as_tensor().fill_(5)
    pool.evict(away)
    pool.free(pool.allocate(2 * MB))
    pool.clear()
    for block in (held, away, plain):
        with pytest.raises(ValueError, match="was freed already"):
            pool.free(block)
    stats = pool.stats()
    assert (stats.used, stats.cached, stats.evicted_bytes, stats.active_blocks) == (MB, 0, 0, 0)
    assert tensor.eq(5).all()
    del tensor
    pool.clear()
    assert pool.stats().resident == 0
    pool.allocate(8 * MB)


# Which device ------------------------------------------------------------------------------------


def test_by_default_a_pool_has_a_host_device_of_its_own() -> None:
    pool = MemoryPool(quota=100 * MB, enable_eviction=True)
    assert isinstance(pool.device, native.HostDevice)
    assert pool.allocate(100 * MB).as_tensor().device.type == "cpu"
    assert MemoryPool(1).device is not pool.device
    with pytest.raises(ValueError, match="is not between"):
        MemoryPool(1 << 50)


@pytest.mark.usefixtures("scheduler")
def test_by_default_a_pool_is_on_the_device_that_is_initialized() -> None:
    pool = MemoryPool(64 * MB)
    tensor = pool.allocate(64 * MB).as_tensor().fill_(1)
    with (
        pytest.raises(torch.OutOfMemoryError),
        pgk.context_session(pgk.create_context("a", 256 * MB)),
    ):
        torch.empty(200 * MB, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"and the 256\.00 MiB of device 'host'"):
        MemoryPool(257 * MB)
    del pool
    assert tensor.eq(1).all()


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["copy", "synchronize"])
def test_a_failed_eviction_leaves_the_block_as_it_was(
    pool: MemoryPool, memory: DeviceMemory, call: str
) -> None:
    a, b = pool.allocate(4 * MB), pool.allocate(4 * MB)
    memory.write(a.ptr, b"kept")
    address = a.ptr
    for again in (lambda: pool.evict(a), lambda: pool.allocate(MB)):
        pool.device.inject_fault(1, Device.Call.__members__[call])
        with pytest.raises(DeviceError, match=f"{call}.* failed: injected fault"):
            again()
        assert (a.ptr, evicted(a, b)) == (address, [False, False])
        pool.check_invariants()
    assert memory.read(a.ptr, 4) == b"kept"


@pytest.mark.parametrize("call", ["copy", "map", "create"])
def test_a_failed_restore_can_be_tried_again(
    pool: MemoryPool, memory: DeviceMemory, call: str
) -> None:
    block = pool.allocate(5 * MB)
    memory.write(block.ptr, b"kept")
    pool.evict(block)
    pool.device.inject_fault(1, Device.Call.__members__[call])
    with pytest.raises(DeviceError, match=f"{call}.* failed: injected fault"):
        pool.restore(block)
    assert block.is_evicted
    pool.check_invariants()
    pool.restore(block)
    assert memory.read(block.ptr, 4) == b"kept"


def test_what_is_cached_is_given_up_where_the_device_is_short() -> None:
    host = native.HostDevice(8 * MB)
    pool = MemoryPool(8 * MB, device=host)
    pool.free(pool.allocate(4 * MB))
    taken = host.create(4 * MB)
    pool.allocate(3 * MB)
    pool.check_invariants()
    with pytest.raises(DeviceError, match="out of memory"):
        pool.allocate(2 * MB)
    pool.check_invariants()
    host.release(taken)
    pool.allocate(2 * MB)


class Tracked:
    """A pool whose blocks and their contents are known also when a call fails."""

    def __init__(self, device: Device) -> None:
        self.memory = DeviceMemory(device)
        self.pool: MemoryPool | None = None
        self.blocks: dict[MemoryBlock, bytes] = {}

    def allocate(self, size: int) -> MemoryBlock:
        assert self.pool
        block = self.pool.allocate(size)
        self.blocks[block] = b"%08d" % block.id
        if isinstance(self.pool.device, native.HostDevice):
            block.as_tensor()[:8] = torch.tensor(list(self.blocks[block]), dtype=torch.uint8)
        return block

    def free(self, block: MemoryBlock) -> None:
        assert self.pool
        self.pool.free(block)
        del self.blocks[block]

    def everything(self, device: Device) -> None:
        """Make every kind of device call; raises what the device raises."""
        self.pool = MemoryPool(8 * MB, True, device)
        a, b = self.allocate(5 * MB), self.allocate(MB)
        self.pool.evict(a)
        self.free(self.allocate(3 * MB))
        self.pool.restore(a)
        c, _ = self.allocate(3 * MB), self.allocate(4 * MB)
        self.pool.restore(b)
        self.free(c)
        self.allocate(3 * MB)
        self.blocks.clear()
        self.pool.clear()
        self.pool = None

    def check_and_free(self, pool: MemoryPool) -> None:
        pool.check_invariants()
        for block, contents in self.blocks.items():
            pool.restore(block)
            assert self.memory.read(block.ptr, len(contents)) == contents
            pool.free(block)
        self.blocks.clear()
        pool.free(pool.allocate(8 * MB))
        pool.check_invariants()


LAST_CALL = 45


@pytest.mark.parametrize("n", range(1, LAST_CALL + 1))
def test_any_device_call_may_fail(n: int) -> None:
    """The n-th call fails, whichever it is: the books stay right and no byte is lost."""
    device = native.HostDevice(CAPACITY)
    tracked = Tracked(device)
    device.inject_fault(n)
    with contextlib.suppress(DeviceError):
        tracked.everything(device)
    device.inject_fault(0)

    if tracked.pool is not None:
        tracked.check_and_free(tracked.pool)
        tracked.pool = None
    assert device.free_bytes() == CAPACITY
    assert device.committed_bytes == 0


def test_the_failure_program_reaches_every_call_that_is_tried() -> None:
    """Guards the test above: its range must cover the whole program."""
    device = native.HostDevice(CAPACITY)
    tracked = Tracked(device)
    before = device.count(Device.Call.any)
    tracked.everything(device)
    assert device.count(Device.Call.any) - before == LAST_CALL


@pytest.mark.parametrize("call", ["synchronize", "destroy_stream", "unmap", "release", "unreserve"])
def test_a_pool_goes_also_where_a_call_fails_once(call: str) -> None:
    device = native.HostDevice(CAPACITY)
    pool = MemoryPool(8 * MB, device=device)
    block = pool.allocate(5 * MB)
    block.as_tensor().fill_(1)
    device.inject_fault(1, Device.Call.__members__[call])
    del pool, block
    assert device.free_bytes() == CAPACITY
    assert device.committed_bytes == 0


# Threads -----------------------------------------------------------------------------------------


def test_threads_share_a_pool(pool: MemoryPool) -> None:
    """More than fits in all: what each wrote it reads again, from wherever that was meanwhile."""
    errors: list[BaseException] = []

    def work(mark: int) -> None:
        try:
            for turn in range(60):
                block = pool.allocate(MB + turn * 1000)
                block.as_tensor().fill_(mark)
                if turn % 3 == 0:
                    pool.evict(block)
                elif turn % 3 == 1:
                    pool.touch(block)
                assert block.as_tensor().eq(mark).all()
                pool.free(block)
                assert pool.stats().used <= 8 * MB
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.stats().allocation_count == 240
