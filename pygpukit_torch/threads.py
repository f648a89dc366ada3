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

_start = threading.Thread.start
_submit: Any = ThreadPoolExecutor.submit
_in_pool = threading.local()


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
    # The workers of a pool outlive the call that happens to start them.
    context = None if getattr(_in_pool, "submits", False) else native.current_context()
    if context is not None:
        # A daemon (a progress bar's monitor, say) may never end; the context can go before it.
        self.run = _in_context(self.run, context, keeps_active=not self.daemon)  # type: ignore[method-assign]
    _start(self)


@wraps(_submit)
def _submit_in_context(
    self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> "Future[Any]":
    context = native.current_context()
    if context is not None:
        fn = _in_context(fn, context, keeps_active=True)
    before = getattr(_in_pool, "submits", False)
    _in_pool.submits = True
    try:
        future: Future[Any] = _submit(self, fn, *args, **kwargs)
        return future
    finally:
        _in_pool.submits = before


def _in_context(
    call: Callable[..., Any], context: native.Context, *, keeps_active: bool
) -> Callable[..., Any]:
    session = native.Session(context, ordered=True, keeps_active=keeps_active)

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        session.enter()
        try:
            return call(*args, **kwargs)
        finally:
            session.exit()

    return run
