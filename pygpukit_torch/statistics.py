"""What ``torch.cuda.memory_stats`` and ``memory_summary`` say, for one context."""

import types
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pygpukit_torch import native


def statistics_of(usage: native.Usage, page_bytes: int) -> dict[str, int]:
    """Return the figures of a context by torch's keys, and those that only contexts have.

    What is evicted is not allocated on the device, so that allocated memory is never more than
    reserved memory: libraries subtract them.
    """
    counters = usage.counters
    blocks = _Flow(counters.allocations, counters.frees)
    small_blocks = _Flow(counters.small_allocations, counters.small_frees)
    data = _Flow(counters.allocated_bytes, counters.allocated_bytes - usage.used)
    small_data = _Flow(counters.small_allocated_bytes, counters.small_freed_bytes)
    active = _Flow(data.came, data.went - usage.fenced)
    most = usage.peak_resident
    peaks = tuple(min(peak, most) for peak in (usage.peak, usage.large_peak, usage.small_peak))
    away = min(usage.used, usage.evicted)
    active_away = min(usage.used + usage.fenced, usage.evicted)
    # A page that is moved out is not unmapped: what has gone never gets less.
    mapped, unmapped = counters.pages_mapped, counters.pages_unmapped
    pages = _Flow(mapped, unmapped)
    reserved = _Flow(mapped * page_bytes, unmapped * page_bytes)
    pages_away = mapped - unmapped - usage.resident // page_bytes
    none = _Flow(0, 0)
    return {
        **_rows("allocation", blocks, small_blocks),
        **_rows("segment", pages, none, (most // page_bytes, most // page_bytes, 0), pages_away),
        **_rows("active", blocks, small_blocks),
        **_rows("inactive_split", none, none),
        **_rows("allocated_bytes", data, small_data, peaks, away),
        **_rows("reserved_bytes", reserved, none, (most, most, 0), pages_away * page_bytes),
        **_rows("active_bytes", active, small_data, peaks, active_away),
        **_rows("inactive_split_bytes", none, none),
        **_rows("requested_bytes", data, small_data, peaks, away),
        **_row("oversize_allocations", none),
        **_row("oversize_segments", none),
        "max_split_size": -1,
        "num_alloc_retries": 0,
        "num_ooms": counters.refusals,
        "num_sync_all_streams": 0,
        "num_device_alloc": mapped,
        "num_device_free": unmapped,
        "num_growths": counters.growths,
        "num_evictions": counters.evictions,
        "num_restores": counters.restores,
        "num_pages_unchanged": counters.pages_unchanged,
        "evicted_bytes.current": usage.evicted,
        "evicted_bytes.copied_out": counters.bytes_out,
        "evicted_bytes.copied_in": counters.bytes_in,
        "page_bytes": page_bytes,
    }


@dataclass(frozen=True)
class _Flow:
    """What came and what went since the beginning."""

    came: int
    went: int


def _rows(
    name: str,
    everything: _Flow,
    small: _Flow,
    peaks: Sequence[int] = (0, 0, 0),
    away: int = 0,
) -> dict[str, int]:
    """Rows for all, large and small, of which ``away`` is not on the device."""
    large = _Flow(everything.came - small.came, everything.went - small.went)
    large_away = min(away, large.came - large.went)
    return {
        **_row(f"{name}.all", everything, peaks[0], away),
        **_row(f"{name}.large_pool", large, peaks[1], large_away),
        **_row(f"{name}.small_pool", small, peaks[2], away - large_away),
    }


def _row(name: str, flow: _Flow, peak: int = 0, away: int = 0) -> dict[str, int]:
    current = flow.came - flow.went - away
    return {
        f"{name}.current": current,
        f"{name}.peak": max(peak, current),
        f"{name}.allocated": flow.came,
        f"{name}.freed": flow.went,
    }


def summary_of(
    name: str, device_id: int, statistics: dict[str, int], abbreviated: bool = False
) -> str:
    """Return torch's own table for these figures.

    Torch's function asks for the figures of a device, so it is called with another source of them.
    """
    function = torch.cuda.memory.memory_summary
    table = types.FunctionType(
        function.__code__,
        {
            **function.__globals__,
            "memory_stats": lambda device: statistics,
            "_get_device_index": lambda device, optional: device,
        },
    )
    return f"Context {name!r}\n{table(device_id, abbreviated)}"
