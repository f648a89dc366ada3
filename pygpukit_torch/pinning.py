"""Pins: memory that stays where it is."""

import weakref
from types import TracebackType

import torch

from pygpukit_torch import native


class Pin:
    """Keeps a context where it is; made by :meth:`ExecutionContext.pin` and :func:`pin`."""

    def __init__(self, manager: native.Manager, context: native.Context) -> None:
        manager.pin(context)
        self._release = weakref.finalize(self, manager.unpin, context)

    def release(self) -> None:
        """Let the context move again. Once is enough."""
        self._release()

    def __enter__(self) -> "Pin":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def pin(tensor: torch.Tensor) -> Pin:
    """Keep the context that the tensor's memory belongs to where it is, until the pin is released.

    As :meth:`ExecutionContext.pin`, for whoever has a tensor and not its context: also that of a
    context which has been destroyed.

    Raises:
        TypeError: ``tensor`` is no tensor.
        ValueError: its memory is no context's.
        torch.OutOfMemoryError, ContextBusyError, DeviceError: it cannot be brought back.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a tensor, got {type(tensor).__name__} {tensor!r}")
    context = native.context_of(tensor.untyped_storage().data_ptr())
    if context is None:
        raise ValueError("the tensor's memory belongs to no context, and is never moved")
    return Pin(context.manager, context)
