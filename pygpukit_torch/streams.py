"""Streams of contexts, and events that order work between them.

On CUDA they are torch's own: a stream of the driver, wrapped, and ``torch.cuda.Event``. On the host
device the work of a CPU operator is done when the call returns, so a stream there only carries
copies, events and waits; waiting for an event holds the calling thread, because it is the thread
that would go on to read the data.
"""

import asyncio
import warnings
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING

import torch

from pygpukit_torch import event_loop, native

if TYPE_CHECKING:
    from pygpukit_torch.context import ExecutionContext


class CudaContextStream(torch.cuda.ExternalStream):
    """The CUDA stream of one context. Made by :func:`pygpukit_torch.create_context`.

    Usable wherever torch takes a stream. The stream itself is never destroyed: once the context is,
    it may serve another one.
    """

    def __new__(cls, handle: int, device_id: int) -> "CudaContextStream":
        """Wrap the driver's stream."""
        stream: CudaContextStream = super().__new__(  # type: ignore[no-untyped-call]
            cls, handle, device=torch.device("cuda", device_id)
        )
        return stream

    def __init__(self, handle: int, device_id: int) -> None:
        """Nothing is left to do: the base is made by ``__new__``."""

    @property
    def id(self) -> int:
        """The driver's handle, which no other stream of the device has."""
        return self.cuda_stream


class CudaContextEvent(torch.cuda.Event):
    """A point in a context's stream. Made by :func:`pygpukit_torch.record_event`.

    Attributes:
        producer: the context.
    """

    producer: "ExecutionContext | None" = None


class ContextEvent(torch.cpu.Event):
    """A point in a context's stream. Made by :func:`pygpukit_torch.record_event`.

    It stays valid when the context is destroyed.

    Attributes:
        producer: the context, if it was made by ``record_event(context)``.
    """

    producer: "ExecutionContext | None" = None

    def __init__(self, device: native.Device, event: int, check_process: Callable[[], object]):
        self._device = device
        self._check_process = check_process
        self.id = event

    def query(self) -> bool:
        """Whether all work before the event is done."""
        self._check_process()
        return self._device.is_done(self.id)

    def synchronize(self) -> None:
        """Block the calling thread until all work before the event is done."""
        self._check_process()
        self._device.synchronize_event(self.id)

    def record(self, stream: torch.cpu.Stream | None = None) -> None:
        """Mark the present end of ``stream``, a context's, instead of the earlier point."""
        fresh = _context_stream(stream).record_event()
        self._device, self.id = fresh._device, fresh.id

    def wait(self, stream: torch.cpu.Stream | None = None) -> None:
        """Make later work of ``stream``, a context's, wait for the event."""
        _context_stream(stream).wait_event(self)


class ContextStream(torch.cpu.Stream):
    """The stream of one context. Made by :func:`pygpukit_torch.create_context`.

    All methods raise ContextDestroyedError once the context has been destroyed.

    Attributes:
        id: a number that no other stream of the device has.
        priority: as the driver counts, lower is more important; 0 on the host device.
    """

    def __init__(
        self,
        device: native.Device,
        stream: int,
        check_alive: Callable[[], object],
        check_process: Callable[[], object],
    ) -> None:
        self._device = device
        self._check_alive = check_alive
        self._check_process = check_process
        self.id = stream
        self.priority = 0

    def synchronize(self) -> None:
        """Block the calling thread until all work of the stream is done."""
        self._check_alive()
        self._device.synchronize_stream(self.id)

    def query(self) -> bool:
        """Whether all work of the stream is done."""
        return self.record_event().query()

    def record_event(  # type: ignore[override]  # torch's placeholder returns None
        self, event: ContextEvent | None = None
    ) -> ContextEvent:
        """Mark the present end of the stream by a new event, or by ``event``."""
        if event is not None:
            event.record(self)
            return event
        self._check_alive()
        return ContextEvent(self._device, self._device.record(self.id), self._check_process)

    def wait_event(self, event: ContextEvent) -> None:
        """Let work from now on start after ``event``."""
        if not isinstance(event, ContextEvent):
            raise TypeError(f"expected an event from record_event, got {type(event).__name__}")
        self._check_alive()
        self._device.wait(self.id, event.id)
        event.synchronize()

    def wait_stream(self, stream: torch.cpu.Stream) -> None:
        """Let work from now on start after the present work of ``stream``, a context's."""
        self.wait_event(_context_stream(stream).record_event())

    def __repr__(self) -> str:
        return f"<ContextStream {self.id} of device {self._device.name!r}>"


def _context_stream(stream: torch.cpu.Stream | None) -> ContextStream:
    if not isinstance(stream, ContextStream):
        raise TypeError(f"expected the stream of a context, got {type(stream).__name__}")
    return stream


class Joined:
    """That a move which was under way is over; what :func:`pygpukit_torch.wait_event` returns.

    It is over already, unless an event loop runs in the calling thread: then await it.
    """

    def __init__(self, job: native.Job | None = None, *, device_holds: bool = True) -> None:
        self._job = job
        self._device_holds = device_holds

    def __await__(self) -> Generator[object, None, None]:
        job, self._job = self._job, None
        if job is not None:
            yield from event_loop.finish(job).__await__()

    def __del__(self) -> None:
        if self._job is not None and not self._device_holds and not self._job.is_done():
            warnings.warn(
                "wait_event() in a task was not awaited, and memory of the producer is being moved",
                RuntimeWarning,
                stacklevel=2,
            )


def join(manager: native.Manager, context: native.Context) -> Joined:
    """Wait until no page of the context is on its way; in a task, what is returned does."""
    if not context.is_moving:
        return Joined()
    if asyncio._get_running_loop() is None:
        manager.join(context)
        return Joined()
    return Joined(native.Job.join(context), device_holds=manager.device_holds)


def completion_of(
    target: object, device: native.Device
) -> tuple[Callable[[], bool], Callable[[native.Alarm], None] | None]:
    """Return two functions: whether the present work of a stream, or an event, is done; and to
    have an alarm rung once it is, if that can be had: nobody but its owner may hold on to an event.

    Raises:
        TypeError: ``target`` is neither a stream nor an event.
    """
    if isinstance(target, ContextEvent):
        target._check_process()
        event = target.id
    elif isinstance(target, ContextStream):
        event = target.record_event().id
    elif isinstance(target, torch.cuda.Stream) and not isinstance(device, native.HostDevice):
        event = device.record(target.cuda_stream or native.CudaDevice.DEFAULT_STREAM)
    elif isinstance(target, torch.cuda.Event) and not isinstance(device, native.HostDevice):
        return target.query, None
    else:
        raise TypeError(f"expected a stream or an event, got {type(target).__name__}")
    return partial(device.is_done, event), partial(device.notify, event)
