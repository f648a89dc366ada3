"""The kinds of device: what has to be made and installed for contexts on each."""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch

from pygpukit_torch import captures, native, sharing
from pygpukit_torch.errors import InitializationError
from pygpukit_torch.free_memory import FreeMemory
from pygpukit_torch.settings import Settings, free_host_memory


class Backend(ABC):
    """A device with its manager, connected to torch.

    Attributes:
        settings: as given, with all sizes filled in.
    """

    settings: Settings
    device: native.Device
    manager: native.Manager

    @abstractmethod
    def install(self) -> None:
        """Let torch's allocator serve contexts."""

    @abstractmethod
    def uninstall(self) -> None:
        """Put torch's allocator back."""

    @abstractmethod
    def context_destroyed(self, context: native.Context) -> None:
        """Give back what torch itself keeps of the context's memory."""

    @abstractmethod
    def workspaces_of(self, usage: native.Usage) -> int:
        """Return the bytes of the context's memory that torch keeps for cuBLAS."""


def open_backend(settings: Settings) -> Backend:
    """Make the device that the settings name.

    Raises:
        InitializationError: torch's allocator cannot be replaced, or the device not be used.
        ValueError: ``total_vram`` is not a capacity that the device can have.
    """
    return _Cuda(settings) if settings.device == "cuda" else _Host(settings)


def _completed(settings: Settings, device: native.Device) -> Settings:
    total = device.capacity if settings.total_vram is None else settings.total_vram
    backup = settings.host_backup
    if backup is None:
        backup = min(total, free_host_memory() // 2)
    return replace(settings, total_vram=total, host_backup=backup)


def _managed(
    device: native.Device, streams: native.ThreadStreams, settings: Settings
) -> native.Manager:
    return native.Manager(device, streams, settings.host_backup or 0, settings.claim_timeout)


class _Host(Backend):
    """Host memory and CPU tensors."""

    def __init__(self, settings: Settings) -> None:
        assert settings.total_vram is not None
        self.device = native.HostDevice(settings.total_vram)
        self.settings = _completed(settings, self.device)
        self.manager = _managed(self.device, native.host_streams(), self.settings)

    def install(self) -> None:
        native.install_cpu_allocator()

    def uninstall(self) -> None:
        native.uninstall_cpu_allocator()

    def context_destroyed(self, context: native.Context) -> None:
        pass

    def workspaces_of(self, usage: native.Usage) -> int:
        return 0


class _Cuda(Backend):
    """VRAM and CUDA tensors."""

    def __init__(self, settings: Settings) -> None:
        if settings.install:
            try:
                native.cuda_allocator()
            except ValueError as error:
                raise InitializationError(str(error)) from None
        self.device = native.CudaDevice(settings.device_id, settings.total_vram or 0)
        self.settings = _completed(settings, self.device)
        self.manager = _managed(self.device, native.cuda_streams(self.device), self.settings)
        self._wrappings = captures.wrappings() + sharing.wrappings()
        if settings.session_mem_info:
            self._wrappings += FreeMemory(self.manager, settings.device_id).wrappings()

    def install(self) -> None:
        if self.settings.install:
            if not native.cuda_is_initialized():
                torch.cuda.memory.change_current_allocator(ContextAllocator())
            native.install_cuda_allocator()
            native.serve_contexts_of(self.manager)
        for wrapping in self._wrappings:
            wrapping.put_on()

    def uninstall(self) -> None:
        for wrapping in self._wrappings:
            wrapping.take_off()
        if self.settings.install:
            native.uninstall_cuda_allocator()

    def context_destroyed(self, context: native.Context) -> None:
        native.drop_workspaces_of(context)

    def workspaces_of(self, usage: native.Usage) -> int:
        return native.workspace_bytes_of(usage.id)


class ContextAllocator(torch.cuda.memory.CUDAPluggableAllocator):
    """What is registered with torch: its native allocator, decorated.

    Threads in a session are served from their context; all else is torch's as before.
    """

    def __init__(self) -> None:
        # Not the base's, which loads two functions from a library.
        self._allocator = native.cuda_allocator()
