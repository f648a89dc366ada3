"""Moving what a module or a tensor holds into the context of the current session."""

from collections.abc import Iterator
from typing import TypeVar

import torch

from pygpukit_torch import native

Placeable = TypeVar("Placeable", torch.nn.Module, torch.Tensor)


def copy_into_current(
    context: native.Context, device: torch.device, target: Placeable
) -> Placeable:
    """Replace foreign storages of ``target`` by copies in ``context``, the current one."""
    if isinstance(target, torch.Tensor):
        (placed,) = _copies(context, device, [("the tensor", target)])
        return placed if placed is target else placed.requires_grad_(target.requires_grad)

    # Everything is copied before anything is replaced, so that a failure on the way leaves the
    # module as it was.
    named = list(_contents(target))
    placed = _copies(context, device, named)
    for (_, tensor), data in zip(named, placed, strict=True):
        if data is not tensor:
            tensor.data = data
    return target


def _contents(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, gradient and buffer once."""
    for name, parameter in module.named_parameters():
        yield f"parameter {name!r}", parameter
        if parameter.grad is not None:
            yield f"the gradient of {name!r}", parameter.grad
    for name, buffer in module.named_buffers():
        yield f"buffer {name!r}", buffer


def _copies(
    context: native.Context, device: torch.device, named: list[tuple[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Return each tensor over a copy of its storage, or itself where it is in the context."""
    # One allocation can be known to torch as several storages of different lengths.
    largest: dict[int, torch.UntypedStorage] = {}
    for name, tensor in named:
        storage = _storage(name, device, tensor)
        known = largest.get(storage.data_ptr())
        if known is None or known.nbytes() < storage.nbytes():
            largest[storage.data_ptr()] = storage
    # Not storage.clone(): untyped storages come from torch's default allocator, always.
    copied = {
        address: torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
        .untyped_storage()
        .copy_(storage)
        for address, storage in largest.items()
        if storage.nbytes() and not context.block_bytes(address)
    }

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        copy = copied.get(tensor.untyped_storage().data_ptr())
        if copy is None:
            return tensor
        view = (tensor.storage_offset(), tensor.size(), tensor.stride())
        result = torch.empty(0, dtype=tensor.dtype, device=device).set_(copy, *view)
        # Both are lazy: the storage holds the plain values.
        if tensor.is_conj():
            result = result.conj()
        return torch._neg_view(result) if tensor.is_neg() else result

    with torch.no_grad():
        return [placed(tensor) for _, tensor in named]


def _storage(name: str, device: torch.device, tensor: torch.Tensor) -> torch.UntypedStorage:
    here = tensor.device in (device, torch.device("cpu"))
    if tensor.layout is not torch.strided or tensor.is_quantized or not here:
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        places = "CPU" if device.type == "cpu" else f"CPU or {device}"
        raise TypeError(f"{name} cannot be placed: it is {kind}, not a dense {places} tensor")
    try:
        storage = tensor.untyped_storage()
        storage.data_ptr()
    except (RuntimeError, NotImplementedError) as error:
        raise TypeError(f"{name} cannot be placed: it has no storage of its own") from error
    return storage
