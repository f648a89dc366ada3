"""What the device is initialized with: arguments, environment variables and defaults."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch

from pygpukit_torch import native
from pygpukit_torch.errors import InitializationError
from pygpukit_torch.memory import GB, check_bytes, format_bytes

HOST_CAPACITY = 8 * GB
"""Capacity of the host device unless told; committed only as it is used."""

CLAIM_TIMEOUT = 10.0
"""How long a claim of a base waits for contexts in use, in seconds, unless told."""

_log = logging.getLogger("pygpukit_torch")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Settings:
    """A complete set of settings. Sizes in bytes; ``total_vram`` None is all that there is.

    ``claim_timeout`` is in seconds.
    """

    device: str
    device_id: int
    total_vram: int | None
    host_backup: int | None
    claim_timeout: float
    install: bool
    session_mem_info: bool


@dataclass(frozen=True)
class Wishes:
    """What a caller of ``initialize`` asked for; None where it did not."""

    device: str | None = None
    device_id: int | None = None
    total_vram: int | None = None
    host_backup: int | None = None
    claim_timeout: float | None = None
    install: bool | None = None
    session_mem_info: bool | None = None

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
        if self.claim_timeout is not None:
            check_seconds("claim_timeout", self.claim_timeout)
        for name in ("install", "session_mem_info"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")

    def or_environment(self) -> "Wishes":
        """Fill in what was not asked for from the ``PYGPUKIT_*`` variables."""

        def pick(value: _T | None, name: str, parse: Callable[[str], _T]) -> _T | None:
            text = os.environ.get(f"PYGPUKIT_{name.upper()}")
            if value is not None or not text:
                return value
            try:
                return parse(text)
            except ValueError:
                kind = "a number" if parse is float else "a whole number"
                raise ValueError(f"PYGPUKIT_{name.upper()} must be {kind}, got {text!r}") from None

        return Wishes(
            device=pick(self.device, "device", str),
            device_id=pick(self.device_id, "device_id", int),
            total_vram=pick(self.total_vram, "total_vram", int),
            host_backup=pick(self.host_backup, "host_backup", int),
            claim_timeout=pick(self.claim_timeout, "claim_timeout", float),
            install=self.install,
            session_mem_info=self.session_mem_info,
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
        device = wishes.device
        missing = why_no_cuda()
        if device is None:
            device = "cpu" if missing else "cuda"
            if missing:
                _log.warning("using the host device (CPU tensors): %s", missing)
        elif device == "cuda" and missing:
            raise InitializationError(f"device 'cuda' cannot be used: {missing}")
        count = torch.cuda.device_count() if device == "cuda" else 1
        index = wishes.device_id or 0
        if index >= count:
            kind = "of the CUDA devices" if device == "cuda" else "of the host device"
            raise ValueError(
                f"device_id {index} does not exist: the numbers {kind} end at {count - 1}"
            )
        total = wishes.total_vram
        if total is None and device == "cpu":
            total = HOST_CAPACITY
        install = wishes.install is not False
        if not install and device == "cpu":
            raise ValueError("install=False is for CUDA: nothing else serves CPU tensors")
        timeout = CLAIM_TIMEOUT if wishes.claim_timeout is None else float(wishes.claim_timeout)
        tells_session = wishes.session_mem_info is not False
        return Settings(device, index, total, wishes.host_backup, timeout, install, tells_session)


def check_seconds(name: str, value: object) -> None:
    """Raise unless ``value`` is a time in seconds that somebody may have to wait."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, got {type(value).__name__} {value!r}")
    if not 0 <= value <= 1e6:
        raise ValueError(f"{name} must be from 0 to a million seconds, got {value}")


def check_max_sessions(value: object) -> None:
    """Raise unless ``value`` is a number of sessions that may be open at a time."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"max_sessions must be an int or None, got {type(value).__name__} {value!r}"
        )
    if not 1 <= value <= 2**31:
        raise ValueError(f"max_sessions must be at least 1 and a sensible number, got {value}")


def check_device_id(name: str, value: object) -> None:
    """Raise unless ``value`` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def why_no_cuda() -> str | None:
    """Say in a clause why CUDA cannot be used; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not hasattr(native, "CudaDevice"):
        return "pygpukit_torch was built against a torch without CUDA; build it again"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


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
    what = "VRAM, CUDA tensors" if settings.device == "cuda" else "host memory, CPU tensors"
    total = settings.total_vram
    capacity = "all of it" if total is None else f"capacity {format_bytes(total)}"
    return f"{settings.device}:{settings.device_id} ({what}), {capacity}"
