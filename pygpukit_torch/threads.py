"""Threads and pool work that are started inside a session are in its context too.

``Thread(target=model.generate)`` is how streaming is done with Hugging Face, and transformers loads
weights in a thread pool. As long as a device is initialized, ``threading.Thread.start`` and
``concurrent.futures.ThreadPoolExecutor.submit`` hand the caller's context on.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import Any

from pygpukit_torch import native
from pygpukit_torch.errors import ContextDestroyedError

_start = threading.Thread.start
_submit: Any = ThreadPoolExecutor.submit


def hand_contexts_on() -> None:
    """From now on, new threads and submitted work are in the context of whoever makes them."""
    threading.Thread.start = _start_in_context  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = _submit_in_context  # type: ignore[method-assign, assignment]


def stop_handing_contexts_on() -> None:
    """Put back what was there, unless somebody else has wrapped it meanwhile."""
    if threading.Thread.start is _start_in_context:
        threading.Thread.start = _start  # type: ignore[method-assign]
    if ThreadPoolExecutor.submit is _submit_in_context:
        ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign]


@wraps(_start)
def _start_in_context(self: threading.Thread) -> None:
    context = native.current_context()
    if context is None or _serves_a_pool(self):
        _start(self)
        return
    # A daemon (a progress bar's monitor, say) may never end; the context can go before it.
    run = self.run
    self.run = _in_context(run, context, keeps_active=not self.daemon)  # type: ignore[method-assign]
    try:
        _start(self)
    except BaseException:
        self.run = run  # type: ignore[method-assign]
        raise


def _serves_a_pool(thread: threading.Thread) -> bool:
    """Whether it is a pool's, of ``concurrent.futures`` or anyio: it outlives what starts it."""
    target = getattr(thread, "_target", None)
    modules = (type(thread).__module__, getattr(target, "__module__", None) or "")
    return any(module.startswith(("concurrent.futures", "anyio.")) for module in modules)


@wraps(_submit)
def _submit_in_context(
    self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> "Future[Any]":
    context = native.current_context()
    if context is not None:
        fn = _in_context(fn, context, keeps_active=True)
    future: Future[Any] = _submit(self, fn, *args, **kwargs)
    return future


def _in_context(
    call: Callable[..., Any], context: native.Context, *, keeps_active: bool
) -> Callable[..., Any]:
    # Held from now on: the context must not be destroyed before the work has begun. Work that never
    # begins lets go when it is forgotten.
    hold = native.Hold(context) if keeps_active else None
    ticket = native.SessionTicket.inherited()

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal hold
        session = native.Session(context, ordered=True, keeps_active=keeps_active)
        try:
            session.enter(ticket)
        except ContextDestroyedError:  # of a daemon
            return call(*args, **kwargs)
        hold = None
        try:
            return call(*args, **kwargs)
        finally:
            session.exit()

    return run
