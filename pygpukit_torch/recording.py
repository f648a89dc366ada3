"""Records the memory of tensors as a :class:`pygpukit_torch.trace.Trace`."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pygpukit_torch.trace import Allocation, Event, Free, Trace


class _Storage(NamedTuple):
    reference: "weakref.ref[torch.UntypedStorage]"
    size: int
    number: int  # of its allocation; without meaning if the size is 0


class Recording(TorchDispatchMode):
    """A recording; see :func:`record`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._events: list[Event] = []
        self._allocations = 0
        self._streams: dict[int, int] = {}
        self._storages: dict[int, _Storage] = {}  # by id

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        return Trace(tuple(self._events))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # What torch.tensor and the like have made arrives as the argument of this operator.
        given = () if func is torch.ops.aten.lift_fresh.default else (args, kwargs)
        before = {id(storage): storage.nbytes() for storage in self._storages_in(given)}
        result = func(*args, **(kwargs or {}))
        for storage in self._storages_in(result):
            if id(storage) in self._storages or before.get(id(storage)) != storage.nbytes():
                self._note(storage)
        return result

    def _storages_in(self, values: Any) -> Iterator[torch.UntypedStorage]:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and torch._C._has_storage(value):
                value = value.untyped_storage()
            if isinstance(value, torch.UntypedStorage) and value.device == self._device:
                yield value

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._storages.get(key)
        # Memory that torch did not allocate has a fixed size.
        if known is None and not storage.resizable():
            return
        if known is not None and known.size == size:
            return
        if known is not None and known.size:
            self._events.append(Free(known.number))
        # Torch keeps one Python object for a storage as long as either lives.
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = _Storage(reference, size, self._allocations)
        if size:
            self._events.append(Allocation(size, self._stream()))
            self._allocations += 1

    def _forget(self, key: int) -> None:
        storage = self._storages.pop(key)
        if storage.size:
            self._events.append(Free(storage.number))

    def _stream(self) -> int:
        is_cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if is_cuda else 0
        return self._streams.setdefault(stream, len(self._streams))

    def _end(self) -> None:
        self._storages.clear()  # and with the references their callbacks


@contextmanager
def record(device: str | torch.device | None = None) -> Iterator[Recording]:
    """Record the memory of every tensor that the block makes on a device, whoever serves it.

    Afterwards the ``trace`` of what the ``with`` statement gives has sizes, streams and lifetimes
    as torch's operators made them on this thread and in its backward passes; what still lives at
    the end is not freed in it. Not in it: other threads, and what an operator uses only inside (for
    that, see :meth:`Trace.from_snapshot`).

    Args:
        device: by default CUDA where it can be used, else the CPU. On ``"meta"`` a model of any
            size can be recorded without memory.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recording = Recording(torch.empty(0, device=device).device)
    try:
        with recording:
            yield recording
    finally:
        recording._end()
