"""Tensors for other processes.

CUDA hands memory to another process by a handle of the whole allocation, and that of contexts may
move. So what is sent is a copy in memory that belongs to no context.
"""

import multiprocessing.queues
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import islice
from typing import Any

import torch

from pygpukit_torch import native
from pygpukit_torch.wrapping import Wrapping

_LOOKED_AT = 1000  # items of a container: whoever sends more of them sends no tensors


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
    size = source.numel() * source.element_size()
    if source.is_cuda:
        with torch.cuda.device(source.device):
            data = native.empty_outside(size).untyped_storage()
    else:
        data = torch.UntypedStorage._new_shared(size)
    copy = torch.empty(0, dtype=source.dtype, device=source.device)
    return copy.set_(data, 0, source.shape).copy_(source)  # type: ignore[call-overload, no-any-return]


def wrappings() -> list[Wrapping]:
    """Have queues refuse what they cannot send, while the sender can still be told.

    A queue pickles in a thread of its own, which only prints what goes wrong.
    """
    queues = multiprocessing.queues.Queue, multiprocessing.queues.JoinableQueue
    return [Wrapping(queue, "put", _unless_in_a_context) for queue in queues]


def _unless_in_a_context(put: Callable[..., None]) -> Callable[..., None]:
    @wraps(put)
    def ours(self: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
        name = _context_in(obj)
        if name is not None:
            raise RuntimeError(
                f"memory of context {name!r} cannot be shared with other processes, since it may "
                "move: send a copy, pygpukit_torch.share(tensor)"
            )
        put(self, obj, *args, **kwargs)

    return ours


def _context_in(obj: Any) -> str | None:
    """The context of the first CUDA tensor that has one, as far as tensors can be seen."""
    if not isinstance(obj, torch.Tensor | torch.nn.Module | list | tuple | dict):
        return None
    try:
        for tensor in islice(_tensors_of(obj), _LOOKED_AT):
            if not tensor.is_cuda:
                continue
            context = native.context_of(tensor.untyped_storage().data_ptr())
            if context is not None:
                return context.name
    except Exception:  # it is pickling that decides; this is only sooner
        return None
    return None


def _tensors_of(obj: Any) -> Iterator[torch.Tensor]:
    """As far as they can be seen: by themselves, in modules, and in containers three deep."""
    if isinstance(obj, torch.Tensor):
        yield obj
    elif isinstance(obj, torch.nn.Module):
        yield from obj.parameters()
        yield from obj.buffers()
    else:
        yield from _in_container(obj, depth=3)


def _in_container(obj: Any, depth: int) -> Iterator[torch.Tensor]:
    items = obj.values() if isinstance(obj, dict) else obj
    for item in islice(items, _LOOKED_AT):
        if isinstance(item, torch.Tensor | torch.nn.Module):
            yield from _tensors_of(item)
        elif depth > 1 and isinstance(item, list | tuple | dict):
            yield from _in_container(item, depth - 1)
