"""Tensors for other processes.

CUDA hands memory to another process by a handle of the whole allocation, and that of contexts may
move. So what is sent is a copy in memory that belongs to no context.
"""

import multiprocessing.queues
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch

from pygpukit_torch import native
from pygpukit_torch.wrapping import Wrapping

_put = multiprocessing.queues.Queue.put


def share(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to memory that other processes can be sent, and that no context is charged for.

    On the host device that is shared memory. On CUDA it is torch's own memory, taken outside of
    all contexts; the copy is made on the current stream. It is contiguous and has no history.

    Raises:
        TypeError: ``tensor`` is no dense tensor.
        torch.OutOfMemoryError: there is no room for the copy.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise TypeError(f"share() takes a dense tensor, got {type(tensor).__name__}")
    source = tensor.detach()
    copy: torch.Tensor
    if source.is_cuda:
        with torch.cuda.device(source.device):
            data = native.empty_outside(source.numel() * source.element_size())
        copy = data.view(source.dtype).view(source.shape).copy_(source)
    else:
        copy = source.clone(memory_format=torch.contiguous_format).share_memory_()
    return copy


def wrappings() -> list[Wrapping]:
    """Have queues refuse what they cannot send, while the sender can still be told."""
    return [Wrapping(multiprocessing.queues.Queue, "put", _put, _put_unless_in_a_context)]


@wraps(_put)
def _put_unless_in_a_context(self: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    # A queue pickles in a thread of its own, which only prints what goes wrong.
    for tensor in _tensors_of(obj):
        context = native.context_of(tensor.untyped_storage().data_ptr()) if tensor.is_cuda else None
        if context is not None:
            raise RuntimeError(
                f"memory of context {context.name!r} cannot be shared with other processes, since "
                "it may move: send a copy, pygpukit_torch.share(tensor)"
            )
    _put(self, obj, *args, **kwargs)


def _tensors_of(obj: Any) -> Iterator[torch.Tensor]:
    """As far as they can be seen: in containers and modules, and by themselves."""
    for leaf in torch.utils._pytree.tree_leaves(obj):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, torch.nn.Module):
            yield from leaf.parameters()
            yield from leaf.buffers()
