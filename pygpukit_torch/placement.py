"""Moving what a module or a tensor holds into the context of the current session."""

from typing import TypeVar

import torch

from pygpukit_torch import native

Placeable = TypeVar("Placeable", torch.nn.Module, torch.Tensor)


def copy_into_current(context: native.Context, target: Placeable) -> Placeable:
    """Replace foreign storages of ``target`` by copies in ``context``, the current one."""
    copies: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        """Return the same view of a copied storage, or the tensor itself if it is there."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if context.block_bytes(address) or not storage.nbytes():
            return tensor
        if address not in copies:
            # Not storage.clone(): untyped storages come from torch's default allocator, always.
            fresh = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
            copies[address] = fresh.copy_(storage)
        same_view = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(copies[address], *same_view)

    if isinstance(target, torch.Tensor):
        placed = copy(target)
        return placed if placed is target else placed.requires_grad_(target.requires_grad)

    # Everything is copied before anything is replaced, so that running out of memory on the way
    # leaves the module as it was.
    tensors = [*target.parameters(), *target.buffers()]
    gradients = [tensor.grad for tensor in tensors]
    replacements = [copy(tensor) for tensor in tensors]
    replaced_gradients = [None if grad is None else copy(grad) for grad in gradients]
    for tensor, data, grad in zip(tensors, replacements, replaced_gradients, strict=True):
        if data is not tensor:
            tensor.data = data
        if grad is not None:
            tensor.grad = grad
    return target
