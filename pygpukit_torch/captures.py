"""CUDA graphs in sessions: where they are captured, and when they are replayed.

A graph's kernels keep the SMs, the priority and the cuBLAS workspace of the stream that they were
captured on, wherever it is replayed, and ``torch.cuda.graph`` captures on one stream of torch's for
everybody. As long as a CUDA device is initialized, in a session it captures on a stream of the
context instead. ``reduce-overhead`` and ``make_graphed_callables`` capture through it, too. A
replay is no operator: in contexts that yield it waits here.

Torch takes a capture's pool before it begins to capture. Before 2.14 it ends and releases it only
if all goes well, so where a capture fails, or its graph goes in the middle, that is done here.
"""

from functools import wraps
from typing import Any

import torch

from pygpukit_torch import native
from pygpukit_torch.wrapping import Function, Wrapping

_Graph = torch.cuda.CUDAGraph


def wrappings() -> list[Wrapping]:
    """Have graphs in sessions captured and replayed as their contexts need it."""
    wrapped = [
        Wrapping(torch.cuda.graph, "__enter__", _on_own_stream),
        Wrapping(_Graph, "replay", _in_turn),
    ]
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        wrapped += [
            Wrapping(_Graph, "capture_begin", _announced),
            Wrapping(_Graph, "capture_end", _settled),
            Wrapping(_Graph, "reset", _settled_by_reset),
        ]
    return wrapped


def _on_own_stream(enter: Function) -> Function:
    @wraps(enter)
    def ours(self: torch.cuda.graph) -> None:
        context = native.current_context()
        if context is not None:
            handle = context.capture_stream()
            if not _is_one_of(self.capture_stream, handle, context.stream):
                self.capture_stream = torch.cuda.ExternalStream(handle)
                self.stream_ctx = torch.cuda.stream(self.capture_stream)
        enter(self)

    return ours


def _is_one_of(stream: torch.cuda.Stream | None, *handles: int) -> bool:
    return stream is not None and stream.cuda_stream in handles


def _in_turn(replay: Function) -> Function:
    @wraps(replay)
    def ours(self: _Graph) -> None:
        native.pass_gate()
        replay(self)

    return ours


def _announced(begin: Function) -> Function:
    @wraps(begin)
    def ours(self: _Graph, *args: Any, **kwargs: Any) -> None:
        stale = native.Capture.take_announced()  # of a graph that is none of these
        if stale is not None:
            stale.finish()
        try:
            begin(self, *args, **kwargs)
            # If the graph goes, so does this, and what it has not finished is abandoned.
            self._pygpukit_capture = native.Capture.take_announced()  # type: ignore[attr-defined]
        except BaseException:
            capture = native.Capture.take_announced()
            if capture is not None:
                capture.abandon()
            raise

    return ours


def _settled(end: Function) -> Function:
    @wraps(end)
    def ours(self: _Graph) -> None:
        try:
            end(self)
        except BaseException:
            _settle(self)
            raise
        _settle(self)

    return ours


def _settled_by_reset(reset: Function) -> Function:
    @wraps(reset)
    def ours(self: _Graph) -> None:
        is_captured = _is_captured(self)
        reset(self)
        # Torch has released the pool of a graph that was captured.
        _settle(self, is_captured=is_captured)

    return ours


def _settle(graph: _Graph, *, is_captured: bool | None = None) -> None:
    """Leave the pool to a graph that has it, or end what nobody else will.

    A capture that still goes on, since ``capture_end`` was called on another stream, say, is left
    as it is.
    """
    capture = graph.__dict__.get("_pygpukit_capture")
    if capture is None:
        return
    if _is_captured(graph) if is_captured is None else is_captured:
        capture.finish()
    elif capture.goes_on:
        return
    else:
        capture.abandon()
    graph.__dict__["_pygpukit_capture"] = None


def _is_captured(graph: _Graph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True
