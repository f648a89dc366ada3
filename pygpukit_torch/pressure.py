"""Handlers that are asked before a request beyond its context's base has others evicted."""

import logging
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pygpukit_torch import native

if TYPE_CHECKING:
    from pygpukit_torch.context import ExecutionContext

Handler = Callable[["ExecutionContext", int, int], Any]

_log = logging.getLogger("pygpukit_torch")


class PressureHandler:
    """A registered handler; calling it calls the function."""

    def __init__(self, handlers: "PressureHandlers", function: Handler) -> None:
        self._handlers = handlers
        self._function = function

    def remove(self) -> None:
        """Ask it no more. Once is enough."""
        self._handlers.discard(self)

    def __call__(self, context: "ExecutionContext", requested: int, available: int) -> Any:
        """Call the function itself."""
        return self._function(context, requested, available)


class PressureHandlers:
    """All handlers of one manager, in the order of their registration."""

    def __init__(
        self,
        manager: native.Manager,
        find: Callable[[native.Context], "ExecutionContext | None"],
    ) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._handlers: tuple[PressureHandler, ...] = ()
        manager.set_pressure_handler(self._ask)

    def add(self, function: Handler) -> PressureHandler:
        """Register a function."""
        handler = PressureHandler(self, function)
        with self._lock:
            self._handlers += (handler,)
        return handler

    def discard(self, handler: PressureHandler) -> None:
        """Take one out, if it is there."""
        with self._lock:
            self._handlers = tuple(other for other in self._handlers if other is not handler)

    def _ask(self, handle: native.Context, requested: int, available: int) -> bool:
        context = self._find(handle)
        # Destroyed by an earlier handler, say: the request fails by itself.
        return context is None or all(
            _allows(handler, context, requested, available) for handler in self._handlers
        )


def _allows(
    handler: PressureHandler, context: "ExecutionContext", requested: int, available: int
) -> bool:
    try:
        return bool(handler(context, requested, available))
    except BaseException as error:
        # It must not get into whoever allocates.
        _log.exception("a memory pressure handler failed, which counts as a refusal")
        if isinstance(error, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return False
