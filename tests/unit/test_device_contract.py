"""What every device must do, whatever it is made of. Parametrised by the devices there are."""

import ctypes
import threading
from collections.abc import Callable

import pytest
import torch

from pygpukit_torch import DeviceError, native
from pygpukit_torch.native import Device
from tests.device_memory import DeviceMemory

CAPACITY = 32 << 20
PAGE = 2 << 20
ALIGNMENT = 1 << 30

DEVICES: dict[str, Callable[[], Device]] = {"host": lambda: native.HostDevice(CAPACITY)}
if torch.cuda.is_available():
    DEVICES["cuda"] = lambda: native.CudaDevice(0, CAPACITY)


@pytest.fixture(params=list(DEVICES))
def device(request: pytest.FixtureRequest) -> Device:
    return DEVICES[request.param]()


def test_properties(device: Device) -> None:
    assert device.capacity == CAPACITY
    assert device.granularity == PAGE
    assert device.name


def test_mapped_memory_keeps_what_is_written(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(8 * PAGE, ALIGNMENT)
    assert address % ALIGNMENT == 0
    handle = device.create(2 * PAGE)
    assert handle.bytes == 2 * PAGE
    device.map(address + 3 * PAGE, handle)
    memory.write(address + 4 * PAGE - 3, b"across")
    assert memory.read(address + 4 * PAGE - 3, 6) == b"across"


def test_a_handle_keeps_its_contents_when_it_moves(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(8 * PAGE, ALIGNMENT)
    handle = device.create(PAGE)
    device.map(address, handle)
    memory.write(address, b"here")
    device.unmap(address, handle)
    device.map(address + 5 * PAGE, handle)
    assert memory.read(address + 5 * PAGE, 4) == b"here"


def test_a_range_can_be_given_back_and_reserved_again(device: Device) -> None:
    address = device.reserve(4 * PAGE, PAGE)
    handle = device.create(PAGE)
    device.map(address, handle)
    device.unmap(address, handle)
    device.unreserve(address, 4 * PAGE)
    device.unreserve(device.reserve(4 * PAGE, PAGE), 4 * PAGE)


def test_capacity_is_a_limit_and_release_gives_back(device: Device) -> None:
    handles = [device.create(8 * PAGE), device.create(8 * PAGE)]
    with pytest.raises(DeviceError, match=r"create of 2\.00 MiB failed"):
        device.create(PAGE)
    device.release(handles.pop())
    for _ in range(8):
        handles.append(device.create(PAGE))
    with pytest.raises(DeviceError, match="out of memory"):
        device.create(PAGE)


def test_handles_of_many_sizes_do_not_wear_the_device_out(device: Device) -> None:
    for round_ in range(50):
        size = PAGE * (1 + round_ % 7)
        handles = [device.create(size) for _ in range(CAPACITY // size)]
        for handle in handles:
            device.release(handle)


def test_contents_move_to_host_memory_and_back_at_the_same_address(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(2 * PAGE, PAGE)
    near, far = device.create(PAGE), device.create_host(PAGE)
    assert (near.on_host, far.on_host) == (False, True)
    device.map(address, near)
    memory.write(address, b"first" * 4)
    out = native.Move(address, near, far)
    device.move([out])
    assert (out.done, out.copied) == (True, True)
    assert memory.read(address, 20) == b"first" * 4
    memory.write(address + PAGE - 4, b"last")

    device.release(near)
    near = device.create(PAGE)
    back = native.Move(address, far, near)
    device.move([back])
    assert memory.read(address, 5) + memory.read(address + PAGE - 4, 4) == b"firstlast"
    assert back.contents is not None

    again = native.Move(address, near, far, back.contents)
    device.move([again])
    assert (again.done, again.copied) == (True, False)
    assert memory.read(address, 5) + memory.read(address + PAGE - 4, 4) == b"firstlast"


def test_one_changed_byte_is_moved(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(4 * PAGE, PAGE)
    pages = [(address + i * PAGE, device.create(PAGE), device.create_host(PAGE)) for i in range(4)]
    for place, near, _ in pages:
        device.map(place, near)
    device.move([native.Move(place, near, far) for place, near, far in pages])
    back = [native.Move(place, far, near) for place, near, far in pages]
    device.move(back)
    memory.write(address + 3 * PAGE - 1, b"!")
    out = [
        native.Move(place, near, far, move.contents)
        for (place, near, far), move in zip(pages, back, strict=True)
    ]
    device.move(out)
    assert [move.copied for move in out] == [False, False, True, False]
    assert memory.read(address + 3 * PAGE - 1, 1) == b"!"


def test_a_failed_move_tells_whether_what_is_known_still_holds(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(PAGE, PAGE)
    near, far = device.create(PAGE), device.create_host(PAGE)
    device.map(address, near)
    memory.write(address, b"first")
    device.move([native.Move(address, near, far)])
    back = native.Move(address, far, near)
    device.move([back])
    memory.write(address, b"other")
    failed = native.Move(address, near, far, back.contents)
    device.inject_fault(1, Device.Call.move)
    with pytest.raises(DeviceError, match="injected fault"):
        device.move([failed])
    assert not failed.done
    memory.write(address, b"first")
    device.move([native.Move(address, near, far, failed.known)])
    assert memory.read(address, 5) == b"first"


def test_many_moves_both_ways_at_once(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(32 * PAGE, PAGE)
    places = [address + i * PAGE for i in range(16)]
    near = [device.create(PAGE) for _ in range(16)]
    far = [device.create_host(PAGE) for _ in range(16)]
    for i, place in enumerate(places):
        device.map(place, near[i] if i % 2 else far[i])
        memory.write(place, bytes([i]) * 100)
    moves = [
        native.Move(place, near[i], far[i]) if i % 2 else native.Move(place, far[i], near[i])
        for i, place in enumerate(places)
    ]
    device.move(moves)
    assert all(move.done for move in moves)
    for i, place in enumerate(places):
        assert memory.read(place, 100) == bytes([i]) * 100


def test_moves_before_a_failure_are_done_and_the_others_changed_nothing(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(8 * PAGE, PAGE)
    near = [device.create(PAGE) for _ in range(4)]
    far = [device.create_host(PAGE) for _ in range(4)]
    for i in range(4):
        device.map(address + i * PAGE, near[i])
        memory.write(address + i * PAGE, bytes([i]) * 8)
    moves = [native.Move(address + i * PAGE, near[i], far[i]) for i in range(4)]
    device.inject_fault(3, Device.Call.move)
    with pytest.raises(DeviceError, match=r"move of 2.00 MiB failed: injected fault"):
        device.move(moves)
    assert [move.done for move in moves] == [True, True, False, False]
    rest = [move for move in moves if not move.done]
    device.move(rest)
    assert all(move.done for move in rest)
    for i in range(4):
        assert memory.read(address + i * PAGE, 8) == bytes([i]) * 8


def test_a_move_is_between_the_device_and_as_much_host_memory(device: Device) -> None:
    address = device.reserve(2 * PAGE, PAGE)
    near = device.create(PAGE)
    device.map(address, near)
    for other in (device.create(PAGE), device.create_host(2 * PAGE)):
        with pytest.raises(ValueError, match="as much host memory"):
            device.move([native.Move(address, near, other)])


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 512])
def test_sizes_are_multiples_of_the_granularity(device: Device, size: int) -> None:
    with pytest.raises(ValueError, match="multiple of the granularity"):
        device.create(size)
    with pytest.raises(ValueError, match="multiple of the granularity"):
        device.reserve(size, PAGE)


def test_work_of_a_stream_runs_in_order(device: Device) -> None:
    memory = DeviceMemory(device)
    address = device.reserve(PAGE, PAGE)
    device.map(address, device.create(PAGE))
    memory.write(address, b"1234")
    stream = device.create_stream()
    device.copy(address + 4, address, 4, stream)
    device.copy(address + 8, address + 4, 4, stream)
    event = device.record(stream)
    device.synchronize_event(event)
    assert device.is_done(event)
    assert memory.read(address, 12) == b"123412341234"


def test_priorities_are_clamped(device: Device) -> None:
    device.destroy_stream(device.create_stream(-100))
    device.destroy_stream(device.create_stream(100))


@pytest.mark.parametrize(
    "call",
    [call for call in Device.Call.__members__.values() if call != Device.Call.any],
    ids=lambda call: call.name,
)
def test_a_failed_call_changes_nothing(device: Device, call: Device.Call) -> None:
    """Runs every kind of call, fails one kind, and runs the very same call again."""
    memory = DeviceMemory(device)

    def attempt(kind: Device.Call, action: Callable[[], object]) -> object:
        if kind == call:
            device.inject_fault(1, kind)
            with pytest.raises(DeviceError, match=f"{kind.name}.* failed: injected fault"):
                action()
        return action()

    kinds = Device.Call
    address = attempt(kinds.reserve, lambda: device.reserve(2 * PAGE, PAGE))
    handle = attempt(kinds.create, lambda: device.create(PAGE))
    assert isinstance(address, int)
    assert isinstance(handle, native.Handle)
    attempt(kinds.map, lambda: device.map(address, handle))
    stream = attempt(kinds.create_stream, device.create_stream)
    assert isinstance(stream, int)
    memory.write(address, b"kept")
    attempt(kinds.copy, lambda: device.copy(address + 4, address, 4, stream))
    event = attempt(kinds.record, lambda: device.record(stream))
    assert isinstance(event, int)
    attempt(kinds.wait, lambda: device.wait(stream, event))
    attempt(kinds.synchronize, lambda: device.synchronize_stream(stream))
    attempt(kinds.synchronize, device.synchronize)
    assert memory.read(address, 8) == b"keptkept"
    far = attempt(kinds.create_host, lambda: device.create_host(PAGE))
    assert isinstance(far, native.Handle)
    attempt(kinds.move, lambda: device.move([native.Move(address, handle, far)]))
    assert memory.read(address, 8) == b"keptkept"
    device.move([native.Move(address, far, handle)])
    device.release(far)
    attempt(kinds.destroy_stream, lambda: device.destroy_stream(stream))
    attempt(kinds.unmap, lambda: device.unmap(address, handle))
    attempt(kinds.release, lambda: device.release(handle))
    attempt(kinds.unreserve, lambda: device.unreserve(address, 2 * PAGE))


def test_the_nth_call_of_any_kind_fails_once(device: Device) -> None:
    device.inject_fault(3)
    device.create(PAGE)
    stream = device.create_stream()
    with pytest.raises(DeviceError, match="record failed"):
        device.record(stream)
    device.record(stream)
    device.inject_fault(1)
    device.inject_fault(0)
    device.record(stream)


# Streams that can be held: only the host device has them -----------------------------------------


@pytest.fixture
def host() -> native.HostDevice:
    return native.HostDevice(CAPACITY)


def test_a_held_stream_holds_back_its_work_and_who_waits_for_it(host: native.HostDevice) -> None:
    source = ctypes.create_string_buffer(b"data", 4)
    target = ctypes.create_string_buffer(4)
    first, second = host.create_stream(), host.create_stream()
    host.hold(first)
    host.copy(ctypes.addressof(target), ctypes.addressof(source), 4, first)
    copied = host.record(first)
    host.wait(second, copied)
    after = host.record(second)
    assert not host.is_done(copied)
    assert not host.is_done(after)
    assert target.raw == bytes(4)
    host.let_go(first)
    assert host.is_done(copied)
    assert host.is_done(after)
    assert target.raw == b"data"


def test_synchronize_blocks_until_the_stream_is_let_go(host: native.HostDevice) -> None:
    stream = host.create_stream()
    host.hold(stream)
    event = host.record(stream)
    threading.Timer(0.05, host.let_go, [stream]).start()
    host.synchronize_event(event)
    assert host.is_done(event)


def test_a_stream_with_unfinished_work_cannot_be_destroyed(host: native.HostDevice) -> None:
    stream = host.create_stream()
    host.hold(stream)
    host.record(stream)
    with pytest.raises(RuntimeError, match="unfinished work"):
        host.destroy_stream(stream)
    host.let_go(stream)
    host.destroy_stream(stream)


def test_host_memory_is_committed_when_touched_and_given_back_on_release() -> None:
    host = native.HostDevice(CAPACITY)
    address = host.reserve(8 * PAGE, PAGE)
    handle = host.create(8 * PAGE)
    host.map(address, handle)
    assert host.committed_bytes == 0
    ctypes.memset(address, 1, 8 * PAGE)
    assert host.committed_bytes == 8 * PAGE
    host.unmap(address, handle)
    assert host.committed_bytes == 8 * PAGE
    host.release(handle)
    assert host.committed_bytes == 0


@pytest.mark.parametrize("capacity", [0, PAGE - 1, 1 << 50])
def test_host_capacities_that_cannot_be(capacity: int) -> None:
    with pytest.raises(ValueError, match="is not between"):
        native.HostDevice(capacity)
