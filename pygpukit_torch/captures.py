"""CUDA graphs in sessions: where they are captured, and when they are replayed.

A graph's kernels keep the SMs, the priority and the cuBLAS workspace of the stream that they were
captured on, wherever it is replayed, and ``torch.cuda.graph`` captures on one stream of torch's for
everybody. As long as a CUDA device is initialized, in a session it captures on a stream of the
context instead. ``reduce-overhead`` and ``make_graphed_callables`` capture through it, too. A
replay is no operator: in contexts that yield it waits here.
"""

from functools import wraps

import torch

from pygpukit_torch import native

_enter = torch.cuda.graph.__enter__
_replay = torch.cuda.CUDAGraph.replay


def attend_graphs() -> None:
    """From now on, graphs in sessions are captured and replayed as their contexts need it."""
    torch.cuda.graph.__enter__ = _enter_on_own_stream  # type: ignore[method-assign]
    torch.cuda.CUDAGraph.replay = _replay_in_turn  # type: ignore[method-assign]


def stop_attending_graphs() -> None:
    """Put back what was there, unless somebody else has wrapped it meanwhile."""
    if torch.cuda.graph.__enter__ is _enter_on_own_stream:
        torch.cuda.graph.__enter__ = _enter  # type: ignore[method-assign]
    if torch.cuda.CUDAGraph.replay is _replay_in_turn:
        torch.cuda.CUDAGraph.replay = _replay  # type: ignore[method-assign]


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
