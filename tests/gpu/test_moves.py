"""Memory that changes its place under work that uses it. Rates and latencies are printed."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pygpukit_torch import ContextBusyError, native
from pygpukit_torch.runtime import existing
from tests.gpu.beside import at_once, beside

MB = 1 << 20
GB = 1 << 30
PAGE = 32 * MB
WORDS = PAGE // 4


class Pages:
    """Memory in pages, each of which has a place on the device and one in host memory."""

    def __init__(self, device: native.CudaDevice, count: int, size: int) -> None:
        self.device = device
        self.count = count
        self.size = size
        self.address = device.reserve(count * size, size)
        self.near = [device.create(size) for _ in range(count)]
        self.far = [device.create_host(size) for _ in range(count)]
        self.is_far = [False] * count
        self.contents: list[native.Fingerprint | None] = [None] * count
        for index in range(count):
            device.map(self.place(index), self.near[index])
        self.words = self.view("<i4", count * size // 4)

    def place(self, index: int) -> int:
        return self.address + index * self.size

    def view(self, kind: str, size: int) -> torch.Tensor:
        """All of the memory; to be taken while it is on the device, as torch asks where it is."""
        interface = {
            "shape": (size,),
            "typestr": kind,
            "data": (self.address, False),
            "version": 3,
        }
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device="cuda")

    def page(self, index: int) -> torch.Tensor:
        words = self.size // 4
        return self.words[index * words : (index + 1) * words]

    def move(self, indices: Sequence[int], patience: float = 10.0) -> list[native.Move]:
        """Each of the pages to where it is not."""
        moves = [
            native.Move(self.place(index), self.far[index], self.near[index])
            if self.is_far[index]
            else native.Move(
                self.place(index), self.near[index], self.far[index], self.contents[index]
            )
            for index in indices
        ]
        try:
            self.device.move(moves, patience)
        finally:
            for index, move in zip(indices, moves, strict=True):
                if not move.done:
                    continue
                self.is_far[index] = not self.is_far[index]
                if not self.is_far[index]:
                    self.contents[index] = move.contents
        assert all(move.done for move in moves)
        return moves

    def close(self) -> None:
        torch.cuda.synchronize()
        for index in range(self.count):
            handle = self.far[index] if self.is_far[index] else self.near[index]
            self.device.unmap(self.place(index), handle)
        for handle in self.near + self.far:
            self.device.release(handle)
        self.device.unreserve(self.address, self.count * self.size)


@pytest.fixture
def device(cuda: None) -> native.CudaDevice:
    """The one that torch's allocator serves, so that captures are known."""
    runtime = existing()
    assert runtime is not None
    assert isinstance(runtime.device, native.CudaDevice)
    return runtime.device


@pytest.fixture
def make(device: native.CudaDevice) -> Iterator[Callable[[int], Pages]]:
    made: list[Pages] = []

    def make(count: int, size: int = PAGE) -> Pages:
        made.append(Pages(device, count, size))
        return made[-1]

    yield make
    for pages in made:
        pages.close()


def numbered(first: int, last: int) -> torch.Tensor:
    return torch.arange(first * WORDS, last * WORDS, dtype=torch.int32, device="cuda")


def quantiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * q)] * 1e3 for q in (0.5, 0.99))
    return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {ordered[-1] * 1e3:.2f} ms"


# What other threads do meanwhile -----------------------------------------------------------------


def other_stream() -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        matrix = torch.ones(1024, 1024, device="cuda")

    def work() -> None:
        with torch.cuda.stream(stream):
            for _ in range(10):
                matrix.mul_(1.0001).div_(1.0001)
        stream.synchronize()

    return work


def cold_kernels() -> Callable[[], object]:
    """Kernels that are compiled and loaded when they are first launched."""
    stream = torch.cuda.Stream()
    numbers = itertools.count(random.randrange(1 << 20))
    with torch.cuda.stream(stream):
        ones = torch.ones(1000, device="cuda")

    def work() -> None:
        number = next(numbers)
        code = f"template <typename T> T times_{number}(T x) {{ return x * {number}; }}"
        function = torch.cuda.jiterator._create_jit_fn(code)
        with torch.cuda.stream(stream):
            assert (function(ones) == number).all()
        time.sleep(0.03)

    return work


# Torch's empty_cache() must not be called while anybody captures.
capturing = threading.Lock()


def allocations() -> None:
    """``cudaMalloc`` and ``cudaFree``, each time."""
    torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
    with capturing:
        torch.cuda.empty_cache()
    time.sleep(0.003)


def captures() -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        value = torch.ones(1000, device="cuda")
    stream.synchronize()

    def work() -> None:
        graph = torch.cuda.CUDAGraph()
        with (
            capturing,
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            result = value * 2
        with torch.cuda.stream(stream):
            graph.replay()
            assert (result == 2).all()
        time.sleep(0.002)

    return work


def pinned_copies() -> Callable[[], object]:
    stream = torch.cuda.Stream()
    sizes = itertools.cycle([1 * MB, 3 * MB, 8 * MB])

    def work() -> None:
        with torch.cuda.stream(stream):
            source = torch.full((next(sizes),), 3, dtype=torch.uint8, pin_memory=True)
            there = source.to("cuda", non_blocking=True)
            back = torch.empty_like(source, pin_memory=True).copy_(there, non_blocking=True)
        stream.synchronize()
        assert (back == 3).all()

    return work


# Under load --------------------------------------------------------------------------------------

READ, WRITTEN = 8, 4


@pytest.mark.parametrize("toggles", [False, True], ids=["counts", "toggles"])
def test_moves_under_load(make: Callable[[int], Pages], toggles: bool) -> None:
    """A write that is lost, a read of a wrong byte or a touch of no memory would show."""
    pages = make(READ + WRITTEN)
    pages.words.copy_(numbered(0, pages.count))
    read, written = pages.words[: READ * WORDS], pages.words[READ * WORDS :]
    expected = read.sum().item()
    torch.cuda.synchronize()
    latencies: list[float] = []
    updates = itertools.count()

    def reader() -> None:
        start = time.perf_counter()
        assert read.sum().item() == expected
        latencies.append(time.perf_counter() - start)

    def updater() -> None:
        for _ in range(3):
            if next(updates) % 2 and toggles:
                written.sub_(1)
            else:
                written.add_(1)
        torch.cuda.current_stream().synchronize()

    choice = random.Random(5)
    taken: list[float] = []
    outs = ins = copied = 0
    start = time.perf_counter()
    with ExitStack() as stack:
        works = [reader, updater, other_stream(), cold_kernels(), allocations]
        for work in [*works, captures(), pinned_copies()]:
            stack.enter_context(beside(work))
        while time.perf_counter() - start < 10 or (
            min(outs, ins) < 500 and time.perf_counter() - start < 90
        ):
            chosen = choice.sample(range(pages.count), choice.randint(1, 6))
            before = time.perf_counter()
            moves = pages.move(chosen)
            taken.append(time.perf_counter() - before)
            for index, move in zip(chosen, moves, strict=True):
                outs += pages.is_far[index]
                ins += not pages.is_far[index]
                copied += move.copied
                known = pages.is_far[index] and pages.contents[index] is not None
                # What is only read never changes.
                assert move.copied != known or index >= READ
    count = next(updates)
    torch.cuda.synchronize()
    print(
        f"\n{outs} pages out, {ins} in, {copied} copied, {count} updates, {len(latencies)} reads"
        f"\n  reads: {quantiles(latencies)}\n  moves of 1 to 6 pages: {quantiles(taken)}"
    )
    assert torch.equal(read, numbered(0, READ))
    added = count % 2 if toggles else count
    assert torch.equal(written, numbered(READ, READ + WRITTEN) + added)
    assert min(outs, ins) >= 500


# Unchanged pages ---------------------------------------------------------------------------------


def test_one_changed_byte_is_found_wherever_it_is(make: Callable[[int], Pages]) -> None:
    pages = make(12)
    everything = pages.view("|u1", 12 * PAGE)
    pages.words.copy_(numbered(0, 12))
    pages.move(range(12))
    pages.move(range(12))
    assert None not in pages.contents
    choice = random.Random(3)
    for offset in [0, PAGE - 1, *(choice.randrange(PAGE) for _ in range(6))]:
        changed = choice.randrange(12)
        everything[changed * PAGE + offset] ^= 1 << choice.randrange(8)
        kept = pages.words.clone()
        copied = [move.copied for move in pages.move(range(12))]
        assert copied == [index == changed for index in range(12)]
        assert torch.equal(pages.words, kept)
        pages.move(range(12))
        assert torch.equal(pages.words, kept)


def test_fingerprints_tell_pages_apart_and_the_same_ones_not(
    make: Callable[[int], Pages],
) -> None:
    pages = make(8)
    zeros, ones, swapped, same = pages.page(0), pages.page(1), pages.page(2), pages.page(3)
    zeros.zero_()
    ones.fill_(-1)
    pages.page(4).copy_(numbered(0, 1))
    # Two vectors of 16 bytes in each other's place.
    swapped.copy_(pages.page(4))
    swapped[:4], swapped[4:8] = pages.page(4)[4:8].clone(), pages.page(4)[:4].clone()
    same.copy_(pages.page(4))
    pages.move(range(5))
    pages.move(range(5))
    told = [(mark.low, mark.high) for mark in pages.contents[:5] if mark is not None]
    assert told[3] == told[4]
    assert len(set(told)) == 4


# Rates -------------------------------------------------------------------------------------------


def measure(pages: Pages, what: str, indices: Sequence[int]) -> None:
    torch.cuda.synchronize()
    start = time.perf_counter()
    moves = pages.move(indices)
    taken = time.perf_counter() - start
    rate = len(indices) * pages.size / taken / 1e9
    copied = sum(move.copied for move in moves)
    print(f"{what}: {rate:.1f} GB/s, {copied} of {len(moves)} pages copied")


@pytest.mark.parametrize(("size", "total"), [(PAGE, 4 * GB), (2 * MB, GB)], ids=["32 MB", "2 MB"])
def test_rates(make: Callable[[int, int], Pages], size: int, total: int) -> None:
    count = total // size
    pages = make(count, size)
    pages.words.copy_(numbered(0, total // PAGE))
    print()

    everything = range(count)
    half = count // 2
    pages.move([0])  # compiles the kernel
    pages.move([0])
    for _ in range(2):
        pages.contents = [None] * count
        measure(pages, "out", everything)
        measure(pages, "in", everything)
    measure(pages, "out, unchanged", everything)
    measure(pages, "in", everything)
    pages.contents = [None] * count
    pages.move(range(half))
    for _ in range(2):
        measure(pages, "both ways", everything)
        pages.contents = [None] * count
    pages.move(range(half) if pages.is_far[0] else range(half, count))
    # Once all of it has come in, what goes out is only compared.
    pages.move(range(half, count))
    pages.move(range(half, count))
    pages.move(range(half))
    measure(pages, "both ways, unchanged", everything)
    pages.move(range(half, count))
    assert not any(pages.is_far)
    for index in range(0, total // PAGE, 16):
        kept = pages.words[index * WORDS : (index + 16) * WORDS]
        assert torch.equal(kept, numbered(index, index + 16))


def test_how_long_a_reader_waits(make: Callable[[int], Pages]) -> None:
    count = 64
    pages = make(count)
    pages.words.copy_(numbered(0, count))
    pages.move([0])  # compiles the kernel
    pages.move([0])
    elsewhere = torch.ones(1000, device="cuda")
    latencies: list[float] = []

    def reader() -> None:
        start = time.perf_counter()
        assert elsewhere.sum().item() == 1000
        latencies.append(time.perf_counter() - start)

    print()
    everything = range(count)
    pages.contents = [None] * count
    for what in ["out", "in", "out, unchanged", "in"]:
        latencies.clear()
        with beside(reader):
            measure(pages, what, everything)
        print(f"  reads: {quantiles(latencies)}")
    assert torch.equal(pages.words, numbered(0, count))


def test_pages_that_never_stand_still_go_out(make: Callable[[int], Pages]) -> None:
    """What was copied ahead is out of date each time."""
    pages = make(4)
    pages.words.zero_()
    torch.cuda.synchronize()
    updates = itertools.count()

    def updater() -> None:
        next(updates)
        pages.words.add_(1)
        torch.cuda.current_stream().synchronize()

    with beside(updater):
        for _ in range(40):
            pages.move(range(4))
    torch.cuda.synchronize()
    assert (pages.words == next(updates)).all()


def test_the_memory_is_vram_before_and_is_not_afterwards(
    device: native.CudaDevice, make: Callable[[int], Pages]
) -> None:
    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(0)[0]

    count = 16
    torch.cuda.empty_cache()
    pages = make(count)
    # The first moves take what they need for themselves, and keep it.
    pages.move([0])
    pages.move([0])
    with_pages = free()
    pages.move(range(count))
    for handle in pages.near:
        device.release(handle)
    given_back = free() - with_pages
    assert abs(given_back - count * PAGE) <= 16 * MB
    pages.near = [device.create(PAGE) for _ in range(count)]
    pages.move(range(count))
    assert abs(free() - with_pages) <= 16 * MB


# Streams that are held ---------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside frees and cold kernels"])
def test_a_stream_at_work_is_stopped_and_goes_on(
    device: native.CudaDevice, make: Callable[[int], Pages], busy: bool
) -> None:
    pages = make(8)
    pages.words.copy_(numbered(0, 8))
    torch.cuda.synchronize()
    streams = [device.create_stream() for _ in range(2)]
    halves = [pages.words[: 4 * WORDS], pages.words[4 * WORDS :]]
    updates = [0, 0]

    def updater(index: int) -> Callable[[], object]:
        stream = torch.cuda.ExternalStream(streams[index])

        def work() -> None:
            with torch.cuda.stream(stream):
                for _ in range(5):
                    halves[index].add_(1)
                    updates[index] += 1
            stream.synchronize()

        return work

    choice = random.Random(7)
    moved = refused = 0
    taken: list[float] = []
    start = time.perf_counter()
    with ExitStack() as stack:
        for work in [updater(0), updater(1), *([allocations, cold_kernels()] if busy else [])]:
            stack.enter_context(beside(work))
        while time.perf_counter() - start < 10:
            before = time.perf_counter()
            try:
                moved += len(pages.move(choice.sample(range(8), choice.randint(1, 4))))
            except ContextBusyError as error:
                assert "could not be held" in str(error)  # noqa: PT017
                refused += 1
            taken.append(time.perf_counter() - before)
    torch.cuda.synchronize()
    print(f"\n{moved} pages moved, {refused} refused, {updates} updates, {quantiles(taken)}")
    for index, half in enumerate(halves):
        assert torch.equal(half, numbered(4 * index, 4 * index + 4) + updates[index])
    if not busy:
        assert moved > 0
    for stream in streams:
        device.destroy_stream(stream)


def test_moves_and_captures_keep_out_of_each_others_way(
    device: native.CudaDevice, make: Callable[[int], Pages]
) -> None:
    """Another thread's move waits for the capture; the thread's own holds stream by stream."""
    pages = make(2)
    pages.words.zero_()
    stream = torch.cuda.ExternalStream(device.create_stream())
    graph = torch.cuda.CUDAGraph()
    refusals: list[BaseException] = []

    def move() -> None:
        try:
            pages.move([1], patience=0.05)
        except ContextBusyError as error:
            refusals.append(error)

    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        pages.words.add_(1)
        at_once(move)
        pages.move([0])
    assert len(refusals) == 1
    assert "is being captured" in str(refusals[0])
    assert pages.is_far == [True, False]
    pages.move([0, 1])
    graph.replay()
    torch.cuda.synchronize()
    assert (pages.words == 1).all()


def test_who_moves_at_the_same_time_takes_turns(make: Callable[[int], Pages]) -> None:
    several = [make(4) for _ in range(3)]
    for pages in several:
        pages.words.copy_(numbered(0, 4))

    def to_and_fro(pages: Pages) -> None:
        for _ in range(20):
            pages.move(range(4))

    at_once(*(partial(to_and_fro, pages) for pages in several))
    for pages in several:
        assert torch.equal(pages.words, numbered(0, 4))
