"""The one device of the process and the contexts on it."""

import atexit
import os
import threading

import torch

from pygpukit_torch import native, threads
from pygpukit_torch.context import ExecutionContext
from pygpukit_torch.devices import open_backend
from pygpukit_torch.errors import (
    ContextBusyError,
    ContextNotFoundError,
    ForkError,
    InitializationError,
)
from pygpukit_torch.pressure import PressureHandlers
from pygpukit_torch.qos import QoSPolicy
from pygpukit_torch.settings import Settings, Wishes


class Runtime:
    """An initialized device: the native manager, and the Python objects of its contexts.

    Attributes:
        lock: held while the set of contexts or a budget changes; never while memory is allocated.
        pressure_handlers: who is asked before others are evicted.
    """

    def __init__(self, settings: Settings) -> None:
        self.backend = open_backend(settings)
        self.settings = self.backend.settings
        self.device = self.backend.device
        self.manager = self.backend.manager
        self.lock = threading.RLock()
        self._contexts: dict[str, ExecutionContext] = {}
        self.pressure_handlers = PressureHandlers(self.manager, self.find)
        self._process = os.getpid()
        self._closed = False

    @property
    def torch_device(self) -> torch.device:
        """Where tensors of the contexts are."""
        if self.settings.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", self.settings.device_id)

    @property
    def is_foreign(self) -> bool:
        """Whether this is a forked child of the process that made it."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raise ForkError in a forked child, before any lock that a lost thread may hold."""
        if self.is_foreign:
            raise ForkError(
                "this process is a forked child of the one that initialized pygpukit_torch and "
                "cannot use its device (start the process with 'spawn' instead)"
            )

    def close(self) -> None:
        """Refuse further contexts. Raises ContextBusyError if there are any."""
        with self.lock:
            if self._contexts:
                names = ", ".join(repr(name) for name in self._contexts)
                raise ContextBusyError(
                    f"cannot shut down, contexts live: {names}; destroy them first"
                )
            self._closed = True

    @property
    def contexts(self) -> list[ExecutionContext]:
        """Those that live, in the order of creation."""
        with self.lock:
            return list(self._contexts.values())

    def create(
        self,
        name: str,
        max_vram: int,
        base_vram: int,
        qos: QoSPolicy,
        partition: str = "",
        yields: bool = False,
        max_sessions: int | None = None,
    ) -> ExecutionContext:
        """Create a context; arguments are checked by the caller and by the manager."""
        with self.lock:
            if self._closed:
                raise InitializationError("shutdown() was called while the context was created")
            handle = self.manager.create_context(
                name, max_vram, base_vram, qos.tier, partition, yields, max_sessions or 0
            )
            context = self._contexts[name] = ExecutionContext(self, handle, qos, max_sessions)
            return context

    def destroy(self, context: ExecutionContext) -> None:
        """Destroy a context and free its name."""
        self.check_process()
        with self.lock:
            self.manager.destroy_context(context._native)
            del self._contexts[context.name]
            self.backend.context_destroyed(context._native)

    def get(self, name: str) -> ExecutionContext:
        """Find a context by name. Raises ContextNotFoundError."""
        with self.lock:
            try:
                return self._contexts[name]
            except KeyError:
                known = ", ".join(repr(other) for other in self._contexts) or "none"
                raise ContextNotFoundError(
                    f"no context is named {name!r}; there are: {known}"
                ) from None

    def current(self) -> ExecutionContext | None:
        """Return the context of the calling thread's innermost session."""
        handle = native.current_context()
        return None if handle is None else self.find(handle)

    def find(self, handle: native.Context) -> ExecutionContext | None:
        """Return the context of a native one, if it lives."""
        context = self._contexts.get(handle.name)
        return context if context is not None and context._native is handle else None


_runtime: Runtime | None = None
_lock = threading.RLock()


def _renew_lock_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock_in_child)


def _stop_background() -> None:
    # A thread in the driver or in its compiler while these are being taken down could crash.
    if _runtime is not None and not _runtime.is_foreign:
        _runtime.manager.stop_making_ahead()


atexit.register(_stop_background)


def initialize(wishes: Wishes) -> Runtime:
    """Make the device, or return the one there is if it is as wished."""
    global _runtime
    wishes.check()
    with _lock:
        if _runtime is None:
            runtime = Runtime(wishes.resolve())
            native.guard_forks(runtime.manager)
            runtime.backend.install()
            threads.hand_contexts_on()
            _runtime = runtime
        elif conflicts := wishes.conflicts(_runtime.settings):
            raise InitializationError(
                "already initialized with other arguments: asked for "
                + ", ".join(conflicts)
                + "; call shutdown() first"
            )
        _runtime.check_process()
        return _runtime


def existing() -> Runtime | None:
    """Return the runtime if there is one; no initialization. Raises ForkError."""
    runtime = _runtime
    if runtime is not None:
        runtime.check_process()
    return runtime


def get_or_initialize() -> Runtime:
    """Return the runtime, made with the defaults if there is none."""
    return existing() or initialize(Wishes())


def shutdown() -> None:
    """Put torch's allocator back and forget the device."""
    global _runtime
    with _lock:
        runtime = existing()
        if runtime is None:
            return
        runtime.close()
        runtime.manager.set_pressure_handler(None)
        threads.stop_handing_contexts_on()
        runtime.backend.uninstall()
        _runtime = None
        runtime.manager.shut_down()
