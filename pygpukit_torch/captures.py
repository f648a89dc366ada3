"""Captures in sessions of contexts that have SMs of their own.

A graph's kernels run on the SMs of the stream that they were captured on, wherever it is replayed,
and ``torch.cuda.graph`` captures on a stream of torch's. As long as a CUDA device is initialized,
in such a session it captures on a stream of the context instead. ``reduce-overhead`` and
``make_graphed_callables`` capture through it, too.
"""

from functools import wraps

import torch

from pygpukit_torch import native

_enter = torch.cuda.graph.__enter__


def confine_captures() -> None:
    """From now on, captures in sessions stay on the SMs of the context."""
    torch.cuda.graph.__enter__ = _enter_confined  # type: ignore[method-assign]


def stop_confining_captures() -> None:
    """Put back what was there, unless somebody else has wrapped it meanwhile."""
    if torch.cuda.graph.__enter__ is _enter_confined:
        torch.cuda.graph.__enter__ = _enter  # type: ignore[method-assign]


@wraps(_enter)
def _enter_confined(self: torch.cuda.graph) -> None:
    context = native.current_context()
    handle = 0 if context is None else context.capture_stream()
    if (
        context is not None
        and handle
        and not _is_one_of(self.capture_stream, handle, context.stream)
    ):
        self.capture_stream = torch.cuda.ExternalStream(handle)  # type: ignore[no-untyped-call]
        self.stream_ctx = torch.cuda.stream(self.capture_stream)
    _enter(self)


def _is_one_of(stream: torch.cuda.Stream | None, *handles: int) -> bool:
    return stream is not None and stream.cuda_stream in handles
