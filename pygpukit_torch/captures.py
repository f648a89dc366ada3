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
from pygpukit_torch.wrapping import Wrapping

_Graph = torch.cuda.CUDAGraph

_enter = torch.cuda.graph.__enter__
_begin = _Graph.capture_begin
_end = _Graph.capture_end
_reset = _Graph.reset
_replay = _Graph.replay


def wrappings() -> list[Wrapping]:
    """Have graphs in sessions captured and replayed as their contexts need it."""
    wrapped = [
        Wrapping(torch.cuda.graph, "__enter__", _enter, _enter_on_own_stream),
        Wrapping(_Graph, "replay", _replay, _replay_in_turn),
    ]
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        wrapped += [
            Wrapping(_Graph, "capture_begin", _begin, _begin_announced),
            Wrapping(_Graph, "capture_end", _end, _end_announced),
            Wrapping(_Graph, "reset", _reset, _reset_announced),
        ]
    return wrapped


@wraps(_enter)
def _enter_on_own_stream(self: torch.cuda.graph) -> None:
    context = native.current_context()
    if context is not None:
        handle = context.capture_stream()
        if not _is_one_of(self.capture_stream, handle, context.stream):
            self.capture_stream = torch.cuda.ExternalStream(handle)
            self.stream_ctx = torch.cuda.stream(self.capture_stream)
    _enter(self)


def _is_one_of(stream: torch.cuda.Stream | None, *handles: int) -> bool:
    return stream is not None and stream.cuda_stream in handles


@wraps(_replay)
def _replay_in_turn(self: torch.cuda.CUDAGraph) -> None:
    native.pass_gate()
    _replay(self)


@wraps(_begin)
def _begin_announced(self: _Graph, *args: Any, **kwargs: Any) -> None:
    stale = native.Capture.take_announced()  # of a graph that is none of these
    if stale is not None:
        stale.finish()
    try:
        _begin(self, *args, **kwargs)
        # If the graph goes, so does this, and what it has not finished is abandoned.
        self._pygpukit_capture = native.Capture.take_announced()  # type: ignore[attr-defined]
    except BaseException:
        capture = native.Capture.take_announced()
        if capture is not None:
            capture.abandon()
        raise


@wraps(_end)
def _end_announced(self: _Graph) -> None:
    try:
        _end(self)
    except BaseException:
        _settle(self)
        raise
    _settle(self)


@wraps(_reset)
def _reset_announced(self: _Graph) -> None:
    is_captured = _is_captured(self)
    _reset(self)
    # Torch has released the pool of a graph that was captured.
    _settle(self, is_captured=is_captured)


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
