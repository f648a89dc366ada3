"""What the device is initialized with: arguments, environment variables and defaults."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch

from pygpukit_torch.errors import InitializationError
from pygpukit_torch.memory import GB, check_bytes, format_bytes

HOST_CAPACITY = 8 * GB
"""Capacity of the host device unless told; committed only as it is used."""

_log = logging.getLogger("pygpukit_torch")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Settings:
    """A complete set of settings. Sizes in bytes."""

    device: str
    device_id: int
    total_vram: int
    host_backup: int


@dataclass(frozen=True)
class Wishes:
    """What a caller of ``initialize`` asked for; None where it did not."""

    device: str | None = None
    device_id: int | None = None
    total_vram: int | None = None
    host_backup: int | None = None

    def check(self) -> None:
        """Raise TypeError or ValueError for what no device could be."""
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device must be 'cuda', 'cpu' or None, got {self.device!r}")
        if self.device_id is not None:
            check_device_id("device_id", self.device_id)
        if self.total_vram is not None:
            check_bytes("total_vram", self.total_vram)
        if self.host_backup is not None:
            check_bytes("host_backup", self.host_backup, least=0)

    def or_environment(self) -> "Wishes":
        """Fill in what was not asked for from the ``PYGPUKIT_*`` variables."""

        def pick(value: _T | None, name: str, parse: Callable[[str], _T]) -> _T | None:
            text = os.environ.get(f"PYGPUKIT_{name.upper()}")
            if value is not None or not text:
                return value
            try:
                return parse(text)
            except ValueError:
                raise ValueError(
                    f"PYGPUKIT_{name.upper()} must be a whole number, got {text!r}"
                ) from None

        return Wishes(
            device=pick(self.device, "device", str),
            device_id=pick(self.device_id, "device_id", int),
            total_vram=pick(self.total_vram, "total_vram", int),
            host_backup=pick(self.host_backup, "host_backup", int),
        )

    def conflicts(self, settings: Settings) -> list[str]:
        """Describe where ``settings`` differ from what was asked for."""
        return [
            f"{field.name}={getattr(self, field.name)!r} (is {getattr(settings, field.name)!r})"
            for field in fields(self)
            if getattr(self, field.name) not in (None, getattr(settings, field.name))
        ]

    def resolve(self) -> Settings:
        """Choose the device and fill in the defaults.

        Raises:
            InitializationError: the device asked for is not to be had.
            ValueError: a size or number is out of range.
        """
        wishes = self.or_environment()
        wishes.check()
        if wishes.device == "cuda":
            raise InitializationError(f"device 'cuda' cannot be used: {why_no_cuda()}")
        if wishes.device is None:
            _log.warning("using the host device (CPU tensors): %s", why_no_cuda())
        if wishes.device_id:
            raise ValueError(f"device_id {wishes.device_id} does not exist: the host device is 0")
        total = wishes.total_vram or HOST_CAPACITY
        backup = wishes.host_backup
        if backup is None:
            backup = min(total, free_host_memory() // 2)
        return Settings("cpu", 0, total, backup)


def check_device_id(name: str, value: object) -> None:
    """Raise unless ``value`` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def why_no_cuda() -> str:
    """Say in a clause why CUDA is not used."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return "this version of pygpukit_torch does not serve CUDA memory yet"


def free_host_memory() -> int:
    """Bytes of host memory that this process could still use, by the kernel and its cgroup."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        current = int((group / "memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - current))


def describe(settings: Settings) -> str:
    """One line for people."""
    return (
        f"{settings.device}:{settings.device_id} (host memory, CPU tensors), "
        f"capacity {format_bytes(settings.total_vram)}"
    )
