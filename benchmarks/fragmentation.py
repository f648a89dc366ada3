"""What allocators reserve of the device for what programs have live, on recorded traces.

Every trace (``traces``) is replayed on every allocator that there is, each in a process of its own
(``allocators``). ``ratio`` is the peak of what was reserved to the peak of what was live, and ``to
best native`` the reserved bytes to the fewer of torch's native allocator with and without
expandable segments. No work runs on the device, so nothing waits for streams.

RMM's allocators are there where it is installed. Its arena reserves all that it is given, which is
the least of some sizes that suffice.

Without a GPU the traces are replayed on the host device, where there is no other allocator.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import traces
from benchmarks.allocators import Figures, replayed
from benchmarks.peers import EXPANDABLE, NATIVE, OURS, names
from benchmarks.progress import track
from benchmarks.report import Report
from benchmarks.timings import CUDA
from pygpukit_torch.trace import Trace

# How many steps each program takes, quickly and otherwise.
PROGRAMS: dict[str, tuple[Callable[[int], None], int, int]] = {
    "generation": (traces.generation, 12, 160),
    "training": (traces.training, 2, 16),
    "diffusion": (traces.diffusion, 2, 12),
    "three models": (traces.three_models, 6, 60),
}
ADVERSARIAL = (5, 20)
# They share the device: enough for their peaks, and no time is measured.
AT_ONCE = 8


def run(quick: bool) -> Report:
    """Measure. ``quick`` records shorter programs."""
    report = Report(
        "fragmentation",
        "peaks in MiB",
        [
            "trace",
            "events",
            "live",
            "allocator",
            "reserved",
            "ratio",
            "to best native",
            "failure",
        ],
    )
    recorded = {
        name: traces.recorded(program, short if quick else long)
        for name, (program, short, long) in track(PROGRAMS.items(), "fragmentation, traces")
    }
    recorded["adversarial"] = traces.adversarial(ADVERSARIAL[0 if quick else 1])
    compared = names() if CUDA else [OURS]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        for name, trace in recorded.items():
            trace.save(Path(folder, f"{name}.jsonl"))
        figures = dict(
            zip(
                track(compared, "fragmentation, allocators"),
                pool.map(partial(replayed, folder=Path(folder)), compared),
                strict=True,
            )
        )
    for name, trace in recorded.items():
        report.rows += _rows(name, trace, figures)
    return report


def _rows(name: str, trace: Trace, figures: dict[str, Figures]) -> list[dict[str, Any]]:
    reserved = {allocator: figure[name] for allocator, figure in figures.items()}
    natives = [reserved.get(allocator) for allocator in (NATIVE, EXPANDABLE)]
    best = min((figure for figure in natives if isinstance(figure, int)), default=None)
    mib = 1 << 20
    return [
        {
            "trace": name,
            "events": len(trace),
            "live": trace.peak_live_bytes / mib,
            "allocator": allocator,
            "reserved": figure / mib if isinstance(figure, int) else "",
            "ratio": figure / trace.peak_live_bytes if isinstance(figure, int) else "",
            "to best native": figure / best if isinstance(figure, int) and best else "",
            "failure": "" if isinstance(figure, int) else figure,
        }
        for allocator, figure in reserved.items()
    ]
