"""What ``torch.cuda.memory_stats`` and ``memory_summary`` say, for one context."""

import types
from collections.abc import Iterator

import torch

from pygpukit_torch import native

_POOLS = ("all", "large_pool", "small_pool")


def statistics_of(usage: native.Usage, page_bytes: int) -> dict[str, int]:
    """Return the figures of a context by torch's keys, and those that only contexts have."""
    counters = usage.counters
    blocks = _parts(
        (counters.allocations, counters.frees),
        (counters.small_allocations, counters.small_frees),
    )
    freed = counters.allocated_bytes - usage.used
    small = (counters.small_allocated_bytes, counters.small_freed_bytes)
    data = _parts((counters.allocated_bytes, freed), small)
    active = _parts((counters.allocated_bytes, freed - usage.fenced), small)
    peaks = (usage.peak, usage.large_peak, usage.small_peak)
    mapped, unmapped = counters.pages_mapped, counters.pages_unmapped
    pages = _parts((mapped, mapped - usage.resident // page_bytes), (0, 0))
    reserved = _parts((mapped * page_bytes, mapped * page_bytes - usage.resident), (0, 0))
    most = usage.peak_resident
    return {
        **_rows("allocation", blocks),
        **_rows("segment", pages, (most // page_bytes, most // page_bytes, 0)),
        **_rows("active", blocks),
        **_rows("inactive_split", _parts((0, 0), (0, 0))),
        **_rows("allocated_bytes", data, peaks),
        **_rows("reserved_bytes", reserved, (most, most, 0)),
        **_rows("active_bytes", active, peaks),
        **_rows("inactive_split_bytes", _parts((0, 0), (0, 0))),
        **_rows("requested_bytes", data, peaks),
        **dict(_row("oversize_allocations", (0, 0), 0)),
        **dict(_row("oversize_segments", (0, 0), 0)),
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


Flow = tuple[int, int]  # what came and what went since the beginning


def _parts(everything: Flow, small: Flow) -> tuple[Flow, Flow, Flow]:
    large = (everything[0] - small[0], everything[1] - small[1])
    return everything, large, small


def _rows(
    name: str, parts: tuple[Flow, Flow, Flow], peaks: tuple[int, int, int] | None = None
) -> dict[str, int]:
    rows: dict[str, int] = {}
    for i, pool in enumerate(_POOLS):
        rows |= _row(f"{name}.{pool}", parts[i], peaks[i] if peaks else 0)
    return rows


def _row(name: str, flow: Flow, peak: int) -> Iterator[tuple[str, int]]:
    came, went = flow
    yield f"{name}.current", came - went
    yield f"{name}.peak", max(peak, came - went)
    yield f"{name}.allocated", came
    yield f"{name}.freed", went


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
