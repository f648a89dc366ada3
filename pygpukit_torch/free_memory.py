"""How much memory torch says is free: in a session, what its context could have.

So ``device_map="auto"`` and whatever else sizes itself by ``torch.cuda.mem_get_info`` stays within
the budget. Outside of sessions, in C++ and in other libraries the figures are the device's, and so
is ``total_memory`` everywhere.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from pygpukit_torch import native
from pygpukit_torch.wrapping import Wrapping

Asked = Callable[..., tuple[int, int]]


class FreeMemory:
    """What sessions of the contexts of one device are told."""

    def __init__(self, manager: native.Manager, device_id: int) -> None:
        self._manager = manager
        self._device_id = device_id

    def wrappings(self) -> list[Wrapping]:
        """All by which torch tells it."""
        wrappings = [
            Wrapping(owner, "mem_get_info", self.wrapped)
            for owner in (torch.cuda, torch.cuda.memory)
        ]
        if hasattr(torch.accelerator, "get_memory_info"):
            wrappings += [
                Wrapping(owner, "get_memory_info", self.wrapped)
                for owner in (torch.accelerator, torch.accelerator.memory)
            ]
        return wrappings

    def wrapped(self, before: Asked) -> Asked:
        """Answer for sessions in the place of ``before``."""

        @wraps(before)
        def ours(device: Any = None) -> tuple[int, int]:
            told = self.of_session(device)
            return before(device) if told is None else told

        return ours

    def of_session(self, device: Any = None) -> tuple[int, int] | None:
        """Return what the calling thread's context could have now, and its budget, in bytes.

        None outside of sessions, after ``shutdown``, and for what is not the device.
        """
        context = native.current_context()
        if context is None or context.manager is not self._manager or not self._is_it(device):
            return None
        usage = self._manager.usage(context)
        return usage.available, usage.max

    def _is_it(self, device: Any) -> bool:
        if isinstance(device, str | torch.device):
            device = torch.device(device)
            if device.type != "cuda":
                return False
            device = device.index
        elif isinstance(device, torch.cuda.device):
            device = device.idx
        if device is None:
            device = torch.accelerator.current_device_index()
        return bool(device == self._device_id)
