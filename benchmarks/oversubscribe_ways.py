"""The servers that ``oversubscribe`` compares: how each serves more models than fit."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext

import torch

import pygpukit_torch as pgk
from benchmarks.oversubscribe_work import (
    CAPACITY,
    RATIOS,
    LeastRecentlyUsed,
    fitting,
    generated,
    llama,
    needed,
)
from benchmarks.timings import CUDA, DEVICE, copied_bytes, wait_for_host_pool
from pygpukit_torch import context_session


class Server(ABC):
    """Serves requests of its models, which are made one by one. All have ``weights`` bytes."""

    def __init__(self, weights: int) -> None:
        self.models: list[torch.nn.Module] = []
        self.weights = weights
        self.moved = 0

    def make(self, index: int) -> None:
        """Make the next model."""
        self.models.append(llama(index))

    @abstractmethod
    def is_resident(self, index: int) -> bool:
        """Whether all of the model is on the device."""

    @abstractmethod
    def serve(self, index: int, following: int | None) -> list[int]:
        """Answer. ``following`` is the model of the next request, if that is known."""

    def moved_bytes(self) -> int:
        """Return the bytes copied between host and device so far, both ways."""
        return self.moved


class Resident(Server):
    """All models stay on the device, and may have all of it."""

    def is_resident(self, index: int) -> bool:
        """Whether all of the model is on the device."""
        return True

    def serve(self, index: int, following: int | None) -> list[int]:
        """Answer."""
        return generated(self.models[index])


class Contexts(Server):
    """A context for each model: all else is done by entering its session."""

    def __init__(self, weights: int) -> None:
        super().__init__(weights)
        count = needed(max(RATIOS), weights)
        pgk.initialize(device=DEVICE, total_vram=CAPACITY, host_backup=count * CAPACITY // 3)
        self._contexts = [pgk.create_context(f"model {index}", CAPACITY) for index in range(count)]
        wait_for_host_pool()

    def make(self, index: int) -> None:
        """Make the next model in its context."""
        with context_session(self._contexts[index]):
            super().make(index)

    def is_resident(self, index: int) -> bool:
        """Whether no page of the context is in host memory."""
        return not self._contexts[index].usage().evicted

    def serve(self, index: int, following: int | None) -> list[int]:
        """Answer in a session."""
        with context_session(self._contexts[index]):
            if following is not None:
                self._contexts[following].prefetch()
            return generated(self.models[index])

    def moved_bytes(self) -> int:
        """Return what was copied: of unchanged pages nothing is."""
        return copied_bytes(*self._contexts)


class Swapped(Server):
    """As many models as fit are on the device; the least recently used one goes for another one."""

    def __init__(self, weights: int) -> None:
        super().__init__(weights)
        confine()
        self._resident = LeastRecentlyUsed(fitting(weights))

    def make(self, index: int) -> None:
        """Make the next model on the device, in the room of another one."""
        self._make_room(index)
        super().make(index)

    def is_resident(self, index: int) -> bool:
        """Whether it is one of those that fit."""
        return index in self._resident

    def serve(self, index: int, following: int | None) -> list[int]:
        """Answer, with the following model on its way in."""
        self._bring(index)
        self.wait()
        if following is not None:
            self._bring(following)
        return generated(self.models[index])

    @abstractmethod
    def move_in(self, index: int) -> None:
        """Bring a model to the device, or begin to."""

    @abstractmethod
    def move_out(self, index: int) -> None:
        """Give up a model's memory on the device."""

    def wait(self) -> None:
        """Let what comes wait for the models that are on their way in."""

    def _bring(self, index: int) -> None:
        missing = index not in self._resident
        self._make_room(index)
        if missing:
            self.move_in(index)

    def _make_room(self, index: int) -> None:
        evicted = self._resident.use(index)
        if evicted is not None:
            self.move_out(evicted)


class Moved(Swapped):
    """``model.cpu()`` and ``model.cuda()``."""

    def move_in(self, index: int) -> None:
        """Move it to the device."""
        self._move(index, DEVICE)

    def move_out(self, index: int) -> None:
        """Move it to the host."""
        self._move(index, "cpu")

    def _move(self, index: int, device: str) -> None:
        self.moved += self.weights
        if CUDA:
            self.models[index].to(device)
            return
        # Here it would do nothing.
        for parameter in self.models[index].parameters():
            parameter.data = parameter.data.clone()


class Pinned(Swapped):
    """Weights have a copy in pinned memory. They are copied in from there, and dropped."""

    def __init__(self, weights: int) -> None:
        super().__init__(weights)
        self.copies: list[list[torch.Tensor]] = []
        # All copies in are on one stream, so the memory that one model leaves serves the next.
        self._stream = torch.cuda.Stream() if CUDA else None

    def make(self, index: int) -> None:
        """Make the next model, and copies of its weights."""
        super().make(index)
        copies = [
            torch.empty_like(parameter, device="cpu", pin_memory=CUDA).copy_(parameter)
            for parameter in self.models[index].parameters()
        ]
        self.copies.append(copies)

    def move_in(self, index: int) -> None:
        """Begin to copy it in."""
        self.moved += self.weights
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for parameter, copy in self._pairs(index):
                parameter.data = copy.to(DEVICE, non_blocking=True, copy=True)

    def move_out(self, index: int) -> None:
        """Drop the weights; nobody reads them any more, since an answer is on the host."""
        for parameter, copy in self._pairs(index):
            parameter.data = copy

    def wait(self) -> None:
        """Let the current stream wait for the copies."""
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _pairs(self, index: int) -> "zip[tuple[torch.nn.Parameter, torch.Tensor]]":
        return zip(self.models[index].parameters(), self.copies[index], strict=True)


class Offloaded(Swapped):
    """accelerate's ``cpu_offload_with_hook``: forward brings it in, its hook takes it out."""

    def __init__(self, weights: int) -> None:
        super().__init__(weights)
        self._hooks: list[Callable[[], None]] = []

    def make(self, index: int) -> None:
        """Make the next model, and hook it, which takes it out."""
        from accelerate import cpu_offload_with_hook

        super().make(index)
        _, hook = cpu_offload_with_hook(self.models[index], _torch_device())
        self._hooks.append(hook.offload)

    def move_in(self, index: int) -> None:
        """Only count: forward does it."""
        self._count()

    def move_out(self, index: int) -> None:
        """Move it to the host."""
        self._hooks[index]()
        self._count()

    def _count(self) -> None:
        if CUDA:
            self.moved += self.weights


class Layered(Server):
    """accelerate's ``cpu_offload``: each layer is brought in for each forward, and dropped."""

    def __init__(self, weights: int) -> None:
        super().__init__(weights)
        confine()
        self._read: list[Weights] = []

    def make(self, index: int) -> None:
        """Make the next model, and take its weights out."""
        from accelerate import cpu_offload

        super().make(index)
        state = self.models[index].state_dict()
        self._read.append(Weights((name, tensor.to("cpu")) for name, tensor in state.items()))
        del state
        cpu_offload(self.models[index], _torch_device(), state_dict=self._read[index])

    def is_resident(self, index: int) -> bool:
        """Whether all of the model is on the device: never."""
        return False

    def serve(self, index: int, following: int | None) -> list[int]:
        """Answer."""
        return generated(self.models[index])

    def moved_bytes(self) -> int:
        """Return what was read of the weights on the host."""
        return sum(weights.read for weights in self._read) if CUDA else 0


class Weights(dict[str, torch.Tensor]):
    """Weights by name, with the bytes that were read so far."""

    read = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = super().__getitem__(name)
        self.read += weight.nbytes
        return weight


def confine() -> None:
    """Let torch's own allocator have the capacity, and no more."""
    if CUDA:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(CAPACITY / total)


def _torch_device() -> torch.device:
    # With its number, as parameters have it: accelerate compares the two.
    return torch.device("cuda:0" if CUDA else "cpu")


RESIDENT, CONTEXTS, PINNED, MOVED = "resident", "contexts", "pinned", "moved"
OFFLOADED, LAYERED = "offloaded", "layered"
SERVERS: dict[str, Callable[[int], Server]] = {
    RESIDENT: Resident,
    CONTEXTS: Contexts,
    PINNED: Pinned,
    MOVED: Moved,
    OFFLOADED: Offloaded,
    LAYERED: Layered,
}
