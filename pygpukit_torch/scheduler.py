"""The public functions: contexts, sessions, streams and what there is to know about them."""

import warnings

import torch

from pygpukit_torch import runtime as _runtime
from pygpukit_torch.context import ExecutionContext, check_context
from pygpukit_torch.errors import ContextNotFoundError
from pygpukit_torch.figures import ContextStats, SchedulerStats
from pygpukit_torch.memory import GB, KB, MB, ContextUsage, check_bytes
from pygpukit_torch.pinning import Pin, pin
from pygpukit_torch.pressure import Handler, PressureHandler
from pygpukit_torch.qos import QoSPolicy
from pygpukit_torch.session import ContextSession
from pygpukit_torch.settings import Wishes, check_device_id, check_max_sessions, check_seconds
from pygpukit_torch.streams import (
    ContextEvent,
    ContextStream,
    CudaContextEvent,
    CudaContextStream,
    Joined,
    join,
)

__all__ = [
    "GB",
    "KB",
    "MB",
    "ContextEvent",
    "ContextSession",
    "ContextStats",
    "ContextStream",
    "ContextUsage",
    "CudaContextEvent",
    "CudaContextStream",
    "ExecutionContext",
    "Joined",
    "Pin",
    "PressureHandler",
    "QoSPolicy",
    "SchedulerStats",
    "context_session",
    "create_context",
    "current_context",
    "destroy_context",
    "get_available_vram",
    "get_context",
    "get_context_usage",
    "get_stream",
    "initialize",
    "list_contexts",
    "on_memory_pressure",
    "pin",
    "record_event",
    "shutdown",
    "stats",
    "wait_event",
]


def initialize(
    device_id: int | None = None,
    *,
    device: str | None = None,
    total_vram: int | None = None,
    host_backup: int | None = None,
    claim_timeout: float | None = None,
    install: bool | None = None,
    session_mem_info: bool | None = None,
) -> None:
    """Make the device and install the allocator.

    On CUDA, torch's native allocator is decorated: threads in a session are served from their
    context, all else is native's as before. That also works where CUDA is in use already.

    Calling it again is fine as long as no argument asks for something else than there is. What is
    not given comes from the environment (``PYGPUKIT_DEVICE_ID``, ``PYGPUKIT_DEVICE``,
    ``PYGPUKIT_TOTAL_VRAM``, ``PYGPUKIT_HOST_BACKUP``, ``PYGPUKIT_CLAIM_TIMEOUT``), else from the
    defaults.

    Args:
        device_id: which device of the kind, 0 by default.
        device: ``"cpu"``, the host device; ``"cuda"``; or None for CUDA where it can be had and
            the host device, with a line in the log, where it cannot.
        total_vram: bytes that all contexts together may hold. By default all of the VRAM, or 8 GiB
            on the host device, committed as it is used.
        host_backup: bytes of host memory for evicted contexts; by default the smaller of
            ``total_vram`` and half of the free host memory. With 0 nothing is evicted, and no
            reservation is lent.
        claim_timeout: seconds that a claim of a reservation waits for contexts in use to yield, and
            a move for streams to come to rest, 10 by default.
        install: False leaves torch's CUDA allocator alone. Sessions then only serve MemPools made
            with ``torch.cuda.memory.CUDAPluggableAllocator(pygpukit_torch.native.__file__,
            "pgk_malloc", "pgk_free")``, in whole segments: for processes whose allocator cannot
            be replaced.
        session_mem_info: whether ``torch.cuda.mem_get_info`` tells in a session what its context
            could have, and its budget (the default), or False: what the device has.

    Raises:
        InitializationError: the device cannot be had, is initialized in another way, or torch uses
            another CUDA allocator than its native one.
        TypeError, ValueError: an argument or an environment variable is no valid value.
        ForkError: this is a forked child of a process that has initialized.
    """
    _runtime.initialize(
        Wishes(device, device_id, total_vram, host_backup, claim_timeout, install, session_mem_info)
    )


def shutdown() -> None:
    """Undo :func:`initialize`. Does nothing if there was none.

    Tensors of destroyed contexts may still live; they are freed correctly all the same.

    Raises:
        ContextBusyError: contexts live.
    """
    _runtime.shutdown()


def create_context(
    name: str,
    max_vram: int,
    *,
    base_vram: int | None = None,
    qos: QoSPolicy = QoSPolicy.BURSTABLE,
    partition: str | None = None,
    yields: bool = False,
    max_sessions: int | None = None,
    device_id: int | None = None,
) -> ExecutionContext:
    """Create a context; initializes with the defaults if needed.

    Args:
        name: unique among the contexts that live.
        max_vram: the budget in bytes; at least one page of 2 MiB.
        base_vram: the part of it that is reserved. By default ``max_vram`` for a guaranteed
            context, which cannot have less, and 0 for others; best effort cannot have more.
        qos: the tier.
        partition: the id of the partition that the context belongs to, made by a
            ``native.PartitionManager``.
        yields: have its operators wait while guaranteed contexts work, and submit little ahead: for
            work in the background that has time. Not for a guaranteed context.
        max_sessions: how many sessions of it may be open at a time; None for any number. More wait
            for their turn, by tier, then first come, first served. What is entered within a
            session of the context, by the same thread or task or by those started there, counts
            as one with it.
        device_id: the device, which must be the one that was initialized.

    Raises:
        ValueError: a duplicate name, sizes that are inconsistent or exceed the device, an unknown
            partition or device, ``max_sessions`` below 1.
        TypeError: an argument is of the wrong type.
        AdmissionError: the reservation does not fit beside those already made, on the device or
            in the partition.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__} {name!r}")
    if not name.isprintable():  # neither control characters nor halves of surrogate pairs
        raise ValueError(f"name must be printable text, got {name!r}")
    if not isinstance(qos, QoSPolicy):
        raise TypeError(
            f"qos must be a QoSPolicy, as QoSPolicy.GUARANTEED; got {type(qos).__name__} {qos!r}"
        )
    max_vram = check_bytes("max_vram", max_vram)
    if base_vram is None:
        base_vram = max_vram if qos is QoSPolicy.GUARANTEED else 0
    base_vram = check_bytes("base_vram", base_vram, least=0)
    if partition is not None and not isinstance(partition, str):
        raise TypeError(f"partition must be a str, got {type(partition).__name__} {partition!r}")
    if partition == "":
        raise ValueError("partition must be the id of one, or None")
    if not isinstance(yields, bool):
        raise TypeError(f"yields must be a bool, got {type(yields).__name__} {yields!r}")
    if max_sessions is not None:
        check_max_sessions(max_sessions)
    if device_id is not None:
        check_device_id("device_id", device_id)
    runtime = _runtime.get_or_initialize()
    if device_id not in (None, runtime.settings.device_id):
        raise ValueError(
            f"device_id {device_id} is not the initialized {runtime.settings.device_id}"
        )
    if partition is None and runtime.manager.is_divided_up:
        warnings.warn(
            f"partitions have all SMs: context {name!r}, which is in none, runs on all of them",
            stacklevel=2,
        )
    return runtime.create(name, max_vram, base_vram, qos, partition or "", yields, max_sessions)


def get_context(name: str) -> ExecutionContext:
    """Find a context by its name.

    Raises:
        ContextNotFoundError: there is none of that name.
    """
    runtime = _runtime.existing()
    if runtime is None:
        raise ContextNotFoundError(f"no context is named {name!r}; there are: none")
    return runtime.get(name)


def destroy_context(context: ExecutionContext | str) -> None:
    """Destroy a context, given itself or its name: see :meth:`ExecutionContext.destroy`."""
    (get_context(context) if isinstance(context, str) else check_context(context)).destroy()


def list_contexts() -> list[ExecutionContext]:
    """All contexts that live, in the order of their creation."""
    runtime = _runtime.existing()
    return runtime.contexts if runtime else []


def current_context() -> ExecutionContext | None:
    """The context of the innermost session of the calling thread; None outside of sessions."""
    runtime = _runtime.existing()
    return runtime.current() if runtime else None


def context_session(
    context: ExecutionContext, *, wait: bool = True, timeout: float | None = None
) -> ContextSession:
    """Return a session: ``with context_session(ctx):`` runs its body in the context.

    With ``async with`` it is the running task's, whatever else runs on the thread between two of
    its steps; entering does not block the event loop, and leaving awaits what ``with`` waits for.
    It is also a decorator. See :class:`ContextSession`.

    Inside, what torch allocates on the calling thread is charged to the context and comes out of
    its memory; memory freed anywhere, at any time, is credited to the context it came from. On CUDA
    the context's stream is current; its work starts after what the thread had submitted before, and
    leaving waits until the context's stream is done, so that results can be read right away.
    Entering brings back what of the context was evicted. Sessions nest, and a session object may
    be entered again, also by other threads. Where the number of sessions is limited
    (``max_sessions``), entering waits for its turn first, unless the caller is in already.

    Args:
        context: the context.
        wait: False neither orders at the start nor waits at the end: for those who order work by
            events themselves.
        timeout: seconds that entering may wait for its turn; 0 does not wait, None waits as long as
            it takes. It does not limit what comes then, such as bringing the context back.

    Raises:
        TypeError: ``context`` is no context, ``wait`` no bool, or ``timeout`` no number.
        ValueError: ``timeout`` is negative, or more than a million seconds.
        SessionTimeoutError: on entering, if it was not its turn within ``timeout``.
        ContextDestroyedError: on entering, if it has been destroyed.
        torch.OutOfMemoryError: on entering, if it is evicted and there is no room for it; nothing
            is lost, and it can be entered later.
        ContextBusyError: on entering, if work of others did not let it come back in time.
        SessionError: on leaving in another thread than the one that entered; on entering in the
            middle of a CUDA graph capture; on leaving a ``with`` that was held across an ``await``;
            on ``async with`` where no event loop of asyncio runs, or one that cannot be followed;
            on entering by ``with`` where an event loop runs, if it would have to wait for its turn.
        DeviceError: on leaving, if the work on the device failed; on entering, if pages could not
            be brought back.
    """
    if not isinstance(wait, bool):
        raise TypeError(f"wait must be a bool, got {type(wait).__name__} {wait!r}")
    if not isinstance(context, ExecutionContext):  # not check_context(): a call costs
        check_context(context)
    if timeout is not None:
        check_seconds("timeout", timeout)
    return ContextSession(context, wait, timeout)


def get_available_vram() -> int:
    """Bytes of the largest guarantee that would be admitted now.

    The capacity, or what of it the device still has beside memory outside of contexts, less, for
    every context, the larger of its base and the pages in which its live tensors lie.
    """
    return _runtime.get_or_initialize().manager.available()


def get_context_usage(context: ExecutionContext) -> ContextUsage:
    """What a context uses: see :class:`ContextUsage`.

    Raises:
        ContextDestroyedError: it has been destroyed.
    """
    return check_context(context).usage()


def get_stream(context: ExecutionContext) -> ContextStream | CudaContextStream:
    """The context's own stream; on CUDA a ``torch.cuda.ExternalStream`` of its tier's priority."""
    return check_context(context).stream


def on_memory_pressure(handler: Handler) -> PressureHandler:
    """Have ``handler(context, requested, available) -> bool`` asked before others are evicted.

    It is asked when a request of a context can only be served by evicting live memory of others,
    and is beyond the context's base: claims of a base, and memory that comes back on entering, are
    not asked about. ``requested`` and ``available`` are in bytes; the latter is what the context
    could obtain, eviction included. All handlers must return True, else the request raises
    ``torch.OutOfMemoryError``; an exception in one is logged and counts as a refusal. A handler may
    free memory; what it allocates itself is not asked about. Initializes if needed; ``shutdown``
    forgets all handlers.

    Returns:
        The handler, with ``remove()``. So the function may be decorated.

    Raises:
        TypeError: ``handler`` cannot be called.
    """
    if not callable(handler):
        raise TypeError(f"a handler must be callable, got {type(handler).__name__} {handler!r}")
    return _runtime.get_or_initialize().pressure_handlers.add(handler)


def record_event(context: ExecutionContext) -> ContextEvent | CudaContextEvent:
    """Mark the present end of the context's stream; on CUDA by a ``torch.cuda.Event``.

    Raises:
        ContextDestroyedError: it has been destroyed.
    """
    check_context(context)._require_alive()
    stream = context.stream
    event: ContextEvent | CudaContextEvent
    if isinstance(stream, ContextStream):
        event = stream.record_event()
    else:
        event = CudaContextEvent()  # type: ignore[no-untyped-call]
        event.record(stream)
    event.producer = context
    return event


def wait_event(context: ExecutionContext, event: ContextEvent | torch.cuda.Event) -> Joined:
    """Let the context's work from now on start after ``event``.

    On the host device the calling thread waits for it. If the event is another context's, that
    one's memory is not moved from now until the sessions of this one have ended and its stream has
    passed, unless a reservation is claimed; and if it is being moved, the call waits for that. In a
    task of an event loop it does not: there ``await wait_event(...)`` does. (On CUDA that is not
    needed for results to be right: the device holds whoever is at work while a page moves.)

    Raises:
        TypeError: ``event`` does not come from :func:`record_event`.
        ContextDestroyedError: the context has been destroyed.
    """
    check_context(context)._require_alive()
    stream = context.stream
    producer = getattr(event, "producer", None)
    joined = Joined()
    if producer is not None and producer.state != "destroyed":
        context._runtime.manager.declare_consumer(producer._native, context._native)
        joined = join(context._runtime.manager, producer._native)
    if isinstance(stream, ContextStream):
        stream.wait_event(event)  # type: ignore[arg-type]  # says itself what it does not take
    elif isinstance(event, torch.cuda.Event):
        stream.wait_event(event)
    else:
        raise TypeError(f"expected an event from record_event, got {type(event).__name__}")
    return joined


def stats() -> SchedulerStats:
    """Return one consistent record of the device and all contexts."""
    runtime = _runtime.get_or_initialize()
    with runtime.lock:
        states = {context.name: context.state for context in runtime.contexts}
        usage = runtime.manager.device_usage()
    return SchedulerStats(
        device=runtime.settings.device,
        device_id=runtime.settings.device_id,
        capacity=usage.capacity,
        reserved=usage.resident,
        pooled=usage.pooled,
        available=usage.available,
        host_backup=usage.host_limit,
        host_reserved=usage.host_existing,
        host_used=usage.host_taken,
        contexts=tuple(
            ContextStats(
                name=context.name,
                qos=QoSPolicy(context.tier.name),
                partition=context.partition or None,
                state="destroyed" if context.orphan else states[context.name],
                usage=ContextUsage.of(context, runtime.backend.workspaces_of(context)),
                sessions=context.sessions,
                waiting=context.waiting,
                live_blocks=context.live_blocks,
                evictions=context.counters.evictions,
                restores=context.counters.restores,
                bytes_out=context.counters.bytes_out,
                bytes_in=context.counters.bytes_in,
                pages_unchanged=context.counters.pages_unchanged,
                seconds_moving=context.counters.move_nanoseconds / 1e9,
            )
            for context in usage.contexts
        ),
    )
