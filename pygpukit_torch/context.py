"""Execution contexts."""

from typing import TYPE_CHECKING, TypeVar

import torch

from pygpukit_torch import event_loop, native
from pygpukit_torch.errors import ContextDestroyedError
from pygpukit_torch.memory import ContextUsage, check_bytes, format_bytes
from pygpukit_torch.pinning import Pin
from pygpukit_torch.placement import copy_into_current
from pygpukit_torch.qos import QoSPolicy
from pygpukit_torch.session import ContextSession
from pygpukit_torch.statistics import statistics_of, summary_of
from pygpukit_torch.streams import ContextStream, CudaContextStream

if TYPE_CHECKING:
    from pygpukit_torch.runtime import Runtime

Placeable = TypeVar("Placeable", torch.nn.Module, torch.Tensor)


class ExecutionContext:
    """A memory budget, a tier and a stream of its own for one model.

    Made by :func:`pygpukit_torch.create_context`; used through
    :func:`pygpukit_torch.context_session`.
    """

    def __init__(
        self,
        runtime: "Runtime",
        handle: native.Context,
        qos: QoSPolicy,
        max_sessions: int | None,
    ) -> None:
        self._runtime = runtime
        self._native = handle
        self._name = handle.name
        self._qos = qos
        self._max_sessions = max_sessions
        self._stream = self._wrapped_stream()
        usage = runtime.manager.usage(handle)
        self._max_vram = usage.max
        self._base_vram = usage.base

    @property
    def name(self) -> str:
        """The name, unique among the contexts that live."""
        return self._name

    @property
    def max_vram(self) -> int:
        """The budget in bytes."""
        return self._max_vram

    @property
    def base_vram(self) -> int:
        """The reserved part of the budget in bytes."""
        return self._base_vram

    @property
    def qos(self) -> QoSPolicy:
        """The tier."""
        return self._qos

    @property
    def max_sessions(self) -> int | None:
        """How many sessions may be open at a time; None for any number."""
        return self._max_sessions

    @property
    def stream(self) -> ContextStream | CudaContextStream:
        """The context's own stream. It gets another one if its SMs change: see partitions."""
        if self._stream.id != self._native.stream and not self._native.is_destroyed:
            self._stream = self._wrapped_stream()
        return self._stream

    def _wrapped_stream(self) -> ContextStream | CudaContextStream:
        runtime, stream = self._runtime, self._native.stream
        if runtime.settings.device == "cuda":
            return CudaContextStream(stream, runtime.settings.device_id)
        return ContextStream(runtime.device, stream, self._require_alive, runtime.check_process)

    @property
    def partition(self) -> str | None:
        """The id of the partition it belongs to; None outside of partitions.

        Raises:
            ContextDestroyedError: it has been destroyed.
        """
        self._require_alive()
        return self._runtime.manager.usage(self._native).partition or None

    @property
    def yields(self) -> bool:
        """Whether its operators wait while guaranteed contexts work."""
        return self._native.yields

    @property
    def state(self) -> str:
        """``"active"`` with open sessions, ``"idle"`` without, ``"destroyed"`` at the end."""
        if self._native.is_destroyed:
            return "destroyed"
        return "active" if self._native.sessions else "idle"

    def usage(self) -> ContextUsage:
        """What the context uses now.

        Raises:
            ContextDestroyedError: it has been destroyed.
        """
        self._require_alive()
        usage = self._runtime.manager.usage(self._native)
        return ContextUsage.of(usage, self._runtime.backend.workspaces_of(usage))

    def memory_stats(self) -> dict[str, int]:
        """Return the context's figures since creation, by the keys of ``torch.cuda.memory_stats``.

        ``small_pool`` counts blocks of up to 1 MiB. Pages serve blocks of any size, so reserved
        memory and segments, which are pages of ``page_bytes``, are those of ``large_pool``.
        What is evicted is neither allocated nor reserved: ``evicted_bytes.current`` has it.

        Also, torch has none of these: ``num_growths`` counts requests that needed pages,
        ``num_evictions`` and ``num_restores`` how often pages went out and came back,
        ``num_pages_unchanged`` those that went without a copy; ``evicted_bytes.copied_out`` and
        ``evicted_bytes.copied_in`` what was copied. All ``*_bytes`` are in bytes.

        Raises:
            ContextDestroyedError: it has been destroyed.
        """
        self._require_alive()
        usage = self._runtime.manager.usage(self._native)
        return statistics_of(usage, self._native.page_bytes)

    def memory_summary(self, abbreviated: bool = False) -> str:
        """Return the table of ``torch.cuda.memory_summary``, of this context.

        Raises:
            ContextDestroyedError: it has been destroyed.
        """
        statistics = self.memory_stats()
        return summary_of(self._name, self._runtime.settings.device_id, statistics, abbreviated)

    def reset_peak(self) -> None:
        """Let all peaks start again from what there is now.

        Raises:
            ContextDestroyedError: it has been destroyed.
        """
        self._require_alive()
        self._runtime.manager.reset_peaks(self._native)

    def resize(self, max_vram: int, base_vram: int | None = None) -> None:
        """Change the budget, in bytes, and the reserved part of it.

        Args:
            max_vram: the new budget: at most 16 times the one that it was created with, or 16 GiB
                where that is more.
            base_vram: the new reservation; as in ``create_context`` if not given, except that a
                burstable context keeps what it has, as far as the new budget allows.

        Raises:
            ValueError: the sizes are inconsistent, ``max_vram`` is less than one of the context's
                pages, or live tensors hold more than it.
            AdmissionError: the reservation does not fit.
            ContextDestroyedError: it has been destroyed.
        """
        max_vram = check_bytes("max_vram", max_vram)
        if base_vram is not None:
            base_vram = check_bytes("base_vram", base_vram, least=0)
        self._runtime.check_process()
        with self._runtime.lock:
            if base_vram is not None:
                base = base_vram
            elif self._qos is QoSPolicy.GUARANTEED:
                base = max_vram
            else:
                base = min(self._base_vram, max_vram)
            self._runtime.manager.resize_context(self._native, max_vram, base)
            self._max_vram, self._base_vram = max_vram, base

    def evict(self) -> None:
        """Move all of the context's memory to host memory; its addresses stay valid.

        Reading it there is slower, on CUDA by an order of magnitude, but possible. The next session
        brings it back. A reservation stays reserved.

        Raises:
            ContextBusyError: it has open sessions, or those of a declared consumer, or is pinned.
            torch.OutOfMemoryError: ``host_backup`` does not suffice; what was moved stays there.
            DeviceError: the device failed; each page is where it was or where it should be.
            ContextDestroyedError: it has been destroyed.
        """
        self._require_alive()
        self._runtime.manager.evict_context(self._native)

    def restore(self) -> None:
        """Bring all of it back to the device, at the cost of others as a request would.

        Entering a session does that by itself. Does nothing while the context is active.

        Raises:
            torch.OutOfMemoryError: there is no room; it can be tried again.
            ContextBusyError: work of others did not let it come back in time; it can be tried
                again.
            DeviceError: the device failed; it can be tried again.
            ContextDestroyedError: it has been destroyed.
        """
        self._require_alive()
        self._runtime.manager.restore_context(self._native)

    async def evict_async(self) -> None:
        """As :meth:`evict`, while other tasks go on."""
        self._require_alive()
        await event_loop.finish(native.Job.evict(self._native))

    async def restore_async(self) -> None:
        """As :meth:`restore`, while other tasks go on."""
        self._require_alive()
        await event_loop.finish(native.Job.restore(self._native))

    def prefetch(self) -> None:
        """Start :meth:`restore` in the background and return. If it fails, entering tells why.

        Raises:
            ContextDestroyedError: it has been destroyed.
        """
        self._require_alive()
        native.Job.restore(self._native)

    def pin(self) -> Pin:
        """Bring the context back and keep it where it is, until the pin is released.

        For memory that others use on streams that nobody has named: registered with a network
        library, shared with another process, or used by other libraries. Also a context manager.

        Raises:
            torch.OutOfMemoryError, DeviceError, ContextDestroyedError: as :meth:`restore`.
        """
        self._require_alive()
        return Pin(self._runtime.manager, self._native)

    def place(self, target: Placeable) -> Placeable:
        """Copy what ``target`` holds into the context, and charge it there.

        For storage that torch did not allocate in a session of the context: weights that were
        loaded elsewhere, memory-mapped files, ``torch.from_numpy``. On CUDA it brings what is in
        host memory to the device, as ``.to("cuda")`` in a session does. What is in the context
        already is not copied. Shared storages stay shared within one call. It is done in a session,
        which waits for its turn if the context has ``max_sessions``.

        Args:
            target: a module, whose parameters and buffers are replaced in place, or a tensor.

        Returns:
            The module itself; or a tensor with the same contents that requires a gradient if the
            given one did, but has neither its history nor its gradient.

        Raises:
            TypeError: something in it is not a dense tensor on the CPU or the device; a module is
                then as before.
            torch.OutOfMemoryError: the budget does not suffice; a module is then as before.
            ContextDestroyedError: it has been destroyed.
            SessionError: it would have to wait for its turn in a running event loop.
        """
        if not isinstance(target, torch.nn.Module | torch.Tensor):
            raise TypeError(f"place() takes a module or a tensor, got {type(target).__name__}")
        with ContextSession(self):
            return copy_into_current(self._native, self._runtime.torch_device, target)

    def destroy(self) -> None:
        """Give the name and the reservation back. Sessions that wait for their turn are refused.

        Memory that live tensors still hold stays with the device until the last is gone.

        Raises:
            ContextBusyError: sessions are open.
            ContextDestroyedError: it has been destroyed already.
        """
        self._runtime.destroy(self)

    def _require_alive(self) -> None:
        self._runtime.check_process()
        if self._native.is_destroyed:
            raise ContextDestroyedError(f"context {self._name!r} has been destroyed")

    def __repr__(self) -> str:
        if self._runtime.is_foreign:
            return f"<ExecutionContext {self._name!r} of the parent process>"
        if self._native.is_destroyed:
            return f"<ExecutionContext {self._name!r} destroyed>"
        usage = self.usage()
        return (
            f"<ExecutionContext {self._name!r} {self._qos.value} {self.state}: "
            f"used {format_bytes(usage.used)}, reserved {format_bytes(usage.reserved)}, "
            f"base {format_bytes(usage.base)}, max {format_bytes(usage.max)}>"
        )


def check_context(value: object) -> ExecutionContext:
    """Return ``value`` if it is a context. Raises TypeError."""
    if not isinstance(value, ExecutionContext):
        raise TypeError(
            f"expected a context from create_context, got {type(value).__name__} {value!r}"
        )
    return value
