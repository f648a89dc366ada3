"""Sizes: units, checks, and the record of what a context uses."""

from dataclasses import dataclass

from pygpukit_torch import native
from pygpukit_torch.native import format_bytes

KB = 1024
MB = 1024 * KB
GB = 1024 * MB

__all__ = ["GB", "KB", "MB", "ContextUsage", "check_bytes", "format_bytes"]

_LARGEST = 2**63 - 1


def check_bytes(name: str, value: object, *, least: int = 1) -> int:
    """Return ``value`` if it is a size in bytes.

    Raises:
        TypeError: it is not an int.
        ValueError: it is below ``least``, or no size that any machine has.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a whole number of bytes (an int, as 4 * GB), "
            f"got {type(value).__name__} {value!r}"
        )
    if not least <= value <= _LARGEST:
        bound = "positive" if least == 1 else f"at least {least}"
        raise ValueError(f"{name} must be {bound} and a size that exists, got {value}")
    return value


@dataclass(frozen=True, slots=True)
class ContextUsage:
    """What one context uses now. All figures in bytes.

    Attributes:
        used: live blocks, each rounded up to 512 bytes.
        reserved: device memory held, in pages; what is not ``used`` is kept for reuse.
        max: the budget.
        base: the reserved part of the budget.
        peak: the highest ``used`` since creation or :meth:`ExecutionContext.reset_peak`.
        evicted: bytes whose contents are in host memory.
        available: what the context could allocate in addition now, by evicting others if need be.
        workspaces: the part of ``used`` that torch keeps for cuBLAS: one for each thread that
            computes on a stream, 32 MiB on a H100. It goes when the thread leaves a context that is
            more than half full.
    """

    used: int
    reserved: int
    max: int
    base: int
    peak: int
    evicted: int
    available: int
    workspaces: int

    @classmethod
    def of(cls, usage: native.Usage, workspaces: int) -> "ContextUsage":
        """Convert the native record."""
        return cls(
            used=usage.used,
            reserved=usage.resident,
            max=usage.max,
            base=usage.base,
            peak=usage.peak,
            evicted=usage.evicted,
            available=usage.available,
            workspaces=workspaces,
        )
