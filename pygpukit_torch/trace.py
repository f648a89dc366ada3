"""Traces: what a program allocates and frees, to be replayed on any allocator."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from pygpukit_torch import native
from pygpukit_torch.memory import check_bytes

__all__ = [
    "Allocation",
    "Allocator",
    "ContextMemory",
    "Free",
    "Replay",
    "TorchMemory",
    "Trace",
]

_FORMAT = "pygpukit_torch trace 1"


class Allocation(NamedTuple):
    """``size`` bytes are allocated on a stream. Streams are numbered as they first appear."""

    size: int
    stream: int = 0


class Free(NamedTuple):
    """The allocation of this number is freed. They count from 0, in the order of the trace."""

    allocation: int


Event = Allocation | Free


class Allocator(Protocol):
    """What a trace can be replayed on."""

    def allocate(self, size: int, stream: int) -> int:
        """Return the address of ``size`` bytes for the stream of this number."""

    def free(self, address: int) -> None:
        """Take back what ``allocate`` returned."""

    def peak_reserved_bytes(self) -> int:
        """Return the most that was held of the device, in bytes, used or not."""


@dataclass(frozen=True, slots=True)
class Replay:
    """How an allocator served a trace.

    Attributes:
        peak_live_bytes: the most that was allocated at one time, as it was asked for.
        peak_reserved_bytes: the most that the allocator held of the device.
    """

    peak_live_bytes: int
    peak_reserved_bytes: int

    @property
    def ratio(self) -> float:
        """Reserved to live: 1.0 is perfect."""
        return self.peak_reserved_bytes / self.peak_live_bytes if self.peak_live_bytes else 1.0


@dataclass(frozen=True)
class Trace:
    """What was allocated and freed, in order.

    Attributes:
        peak_live_bytes: the most that was allocated at one time, in bytes.

    Raises:
        TypeError: a size, stream or number is not an int.
        ValueError: a size is not positive, or something is freed that does not live.
    """

    events: tuple[Event, ...]
    peak_live_bytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))
        sizes: list[int] = []
        freed: set[int] = set()
        live = peak = 0
        for position, event in enumerate(self.events):
            if isinstance(event, Allocation):
                check_bytes(f"event {position}: size", event.size)
                check_bytes(f"event {position}: stream", event.stream, least=0)
                sizes.append(event.size)
                live += event.size
                peak = max(peak, live)
                continue
            number = check_bytes(f"event {position}: allocation", event.allocation, least=0)
            if number >= len(sizes):
                raise ValueError(
                    f"event {position} frees allocation {number}, which was not made before"
                )
            if number in freed:
                raise ValueError(f"event {position} frees allocation {number} a second time")
            freed.add(number)
            live -= sizes[number]
        object.__setattr__(self, "peak_live_bytes", peak)

    def __len__(self) -> int:
        return len(self.events)

    def __repr__(self) -> str:
        peak = native.format_bytes(self.peak_live_bytes)
        return f"<Trace: {len(self)} events, at most {peak} live>"

    def save(self, path: str | Path) -> None:
        """Write it as JSON lines: ``[size, stream]`` is an allocation, a number frees that one."""
        lines = [json.dumps(_FORMAT)]
        for event in self.events:
            lines.append(json.dumps(event.allocation if isinstance(event, Free) else event))
        Path(path).write_text("\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is not a trace, or a broken one.
        """
        first, *lines = Path(path).read_text().splitlines() or [""]
        if first != json.dumps(_FORMAT):
            raise ValueError(f"{path} is not a trace of this version: {first[:80]!r}")
        return cls(tuple(_parsed(path, number, line) for number, line in enumerate(lines, start=2)))

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any], device: int = 0) -> "Trace":
        """Convert what ``torch.cuda.memory._snapshot()`` returns.

        The history must have been recorded (``torch.cuda.memory._record_memory_history()``). What
        was allocated before it began comes first. Memory lives until it can be reused, so a block
        with recorded uses lives longer than its tensor. What contexts serve is not in the history.

        Raises:
            ValueError: there is no history of the device, or a broken one.
        """
        traces = snapshot.get("device_traces", [])
        if device >= len(traces) or not traces[device]:
            raise ValueError(
                f"the snapshot has no history of device {device}; it is recorded after "
                "torch.cuda.memory._record_memory_history()"
            )
        return cls(tuple(_of_history(traces[device], _live_blocks(snapshot, device))))

    def replay(self, allocator: Allocator) -> Replay:
        """Allocate and free the same sizes in the same order. Nothing is left allocated.

        Raises:
            torch.OutOfMemoryError: or whatever the allocator raises when it has not enough.
        """
        addresses: list[int] = []
        live: set[int] = set()
        try:
            for event in self.events:
                if isinstance(event, Allocation):
                    addresses.append(allocator.allocate(event.size, event.stream))
                    live.add(len(addresses) - 1)
                else:
                    live.remove(event.allocation)
                    allocator.free(addresses[event.allocation])
            return Replay(self.peak_live_bytes, allocator.peak_reserved_bytes())
        finally:
            for number in sorted(live):
                allocator.free(addresses[number])


def _parsed(path: str | Path, number: int, line: str) -> Event:
    try:
        event = json.loads(line)
        return Allocation(*event) if isinstance(event, list) else Free(event)
    except (ValueError, TypeError):
        raise ValueError(f"{path}, line {number} is not an event: {line[:80]!r}") from None


# A block as a snapshot knows it: address, size, stream.
_Block = tuple[int, int, int]


def _live_blocks(snapshot: Mapping[str, Any], device: int) -> Iterator[_Block]:
    for segment in snapshot.get("segments", []):
        if segment["device"] != device:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                size = block.get("requested_size", block["size"])
                yield block.get("address", address), size, segment["stream"]
            address += block["size"]


def _of_history(entries: Iterable[Mapping[str, Any]], live: Iterable[_Block]) -> list[Event]:
    changes = [
        (entry["action"] == "alloc", (entry["addr"], entry["size"], entry["stream"]))
        for entry in entries
        if entry["action"] in ("alloc", "free_completed")
    ]
    known: set[int] = set()
    earlier: list[_Block] = []  # allocated before the history began
    for is_allocation, block in changes:
        if is_allocation:
            if block[0] in known:
                raise ValueError(f"the history allocates {block[0]:#x} twice and frees it once")
            known.add(block[0])
        elif block[0] in known:
            known.remove(block[0])
        else:
            earlier.append(block)
    earlier += [block for block in live if block[0] not in known]

    streams: dict[int, int] = {}
    numbers: dict[int, int] = {}  # of the allocations that live, by address
    events: list[Event] = []
    count = 0
    for is_allocation, (address, size, stream) in [(True, each) for each in earlier] + changes:
        if is_allocation:
            numbers[address] = count
            count += 1
            events.append(Allocation(size, streams.setdefault(stream, len(streams))))
        else:
            events.append(Free(numbers.pop(address)))
    return events


# Allocators -------------------------------------------------------------------------------------


class ContextMemory:
    """A context of its own on a native device, to replay traces on: no torch, no sessions.

    Args:
        device: ``native.HostDevice(capacity)`` or ``native.CudaDevice()``.
        budget: bytes that the context may hold, by default all of the device.
    """

    def __init__(self, device: native.Device, budget: int | None = None) -> None:
        self._device = device
        self._manager = native.Manager(device)
        self.context = self._manager.create_context("replay", budget or device.capacity)
        self._streams = [self.context.stream]
        self._peak = 0

    def allocate(self, size: int, stream: int) -> int:
        """Return an address. Raises ``torch.OutOfMemoryError`` beyond the budget."""
        while stream >= len(self._streams):
            self._streams.append(self._device.create_stream())
        address = self.context.allocate(size, self._streams[stream])
        self._peak = max(self._peak, self._manager.usage(self.context).resident)
        return address

    def free(self, address: int) -> None:
        """Take it back."""
        self.context.free(address)

    def peak_reserved_bytes(self) -> int:
        """Return the most that the context had in pages."""
        return self._peak


class TorchMemory:
    """The current CUDA allocator of torch, whichever that is, to replay traces on.

    Its cache is emptied and its peaks are reset first, so nothing else should be in use.
    """

    def __init__(self) -> None:
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._streams = [torch.cuda.current_stream()]

    def allocate(self, size: int, stream: int) -> int:
        """Return an address. Raises ``torch.OutOfMemoryError`` if there is none."""
        while stream >= len(self._streams):
            self._streams.append(torch.cuda.Stream())
        return int(torch.cuda.caching_allocator_alloc(size, stream=self._streams[stream]))

    def free(self, address: int) -> None:
        """Take it back."""
        torch.cuda.caching_allocator_delete(address)

    def peak_reserved_bytes(self) -> int:
        """Return what torch says of itself. Not every pluggable allocator can be asked."""
        return int(torch.cuda.memory_stats()["reserved_bytes.all.peak"])
