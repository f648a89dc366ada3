"""Draws reports as SVG, with matplotlib."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.typing import RcKeyType

from benchmarks.qos_results import SHOWN, Results
from benchmarks.report import Reports, Stored, size_name

Row = dict[str, Any]

# Text stays text, and the same figures give the same file.
STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pygpukit_torch",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
}
WIDTH = 9.0  # inches
BAR = 0.19  # inches from one bar to the next


def draw(reports: Reports, folder: Path) -> None:
    """Write a picture of every report to the folder, by its story's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for story, report in reports.items():
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever the user has configured
            matplotlib.rcParams.update(STYLE)
            figure = PLOTS[story](report)
            # Neither when nor with which version: what is drawn is all that may differ.
            metadata = {"Date": None, "Creator": None}
            figure.savefig(folder / f"{story}.svg", metadata=metadata)


def bars(
    report: Stored,
    title: str,
    groups: Callable[[Row], str],
    lengths: Callable[[Row], Row],
    digits: str = ".3g",
) -> Figure:
    """Draw groups of bars. ``lengths`` names what a row has: figures, or texts of what failed.

    Rows may belong to the same group; a group without bars is left out.
    """
    found: dict[str, Row] = {}
    for row in report["rows"]:
        if lengths(row):
            found.setdefault(groups(row), {}).update(lengths(row))
    names = list(dict.fromkeys(name for group in found.values() for name in group))
    gap = any(len(group) > 1 for group in found.values())
    count = sum(len(group) + gap for group in found.values())
    figure, axes = _figure(report, title, BAR * count + 1)
    ticks: list[float] = []
    y = 0
    for group in found.values():
        ticks.append(y + (len(group) - 1) / 2)
        for name, value in group.items():
            failed = isinstance(value, str)
            bar = axes.barh(y, 0 if failed else value, 0.85, color=f"C{names.index(name)}")
            axes.bar_label(bar, ["failed" if failed else f"{value:{digits}}"], padding=3)
            y += 1
        y += gap
    axes.set_yticks(ticks, list(found))
    axes.tick_params("y", length=0)
    axes.set_ylim(y - gap - 0.4, -0.6)
    axes.margins(x=0.08)
    if len(names) > 1:
        keys = [Patch(color=f"C{index}") for index in range(len(names))]
        figure.legend(keys, names, loc="outside lower center", ncols=4)
    return figure


def alloc(report: Stored) -> Figure:
    """Draw what a pair takes by its size, on one thread and on the most."""
    figure, axes = _figure(report, "ns of allocate + free that hits, by size", 3.6)
    threads = sorted({row["threads"] for row in report["rows"]})
    for colour, column, label in (("C0", "stock", "torch"), ("C1", "session", "in sessions")):
        for count, line in ((threads[0], "o-"), (threads[-1], "o--")):
            rows = [row for row in report["rows"] if row["threads"] == count]
            x, y = [row["bytes"] for row in rows], [row[column] for row in rows]
            axes.plot(x, y, line, color=colour, label=f"{label}, threads: {count}")
    sizes = sorted({row["bytes"] for row in report["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [size_name(size) for size in sizes])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right center")
    return figure


def overlap(report: Stored) -> Figure:
    """Draw when each kernel ran, with a row for each stream."""
    machine, rows = report["machine"], report["rows"]
    title = f"Kernels of two models in two contexts, one thread: {machine['overlapped']} overlapped"
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    figure, axes = _figure(report, title, 0.5 * len(streams) + 1)
    for index, stream in enumerate(streams):
        spans = [
            (row["start"] / 1e3, row["duration"] / 1e3) for row in rows if row["stream"] == stream
        ]
        axes.broken_barh(spans, (index - 0.4, 0.8), color=f"C{index}", edgecolor="white", lw=0.4)
    axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return figure


def _figure(report: Stored, title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height), layout="constrained")
    figure.suptitle(f"{title} ({_machine(report)})", size="medium")
    return figure, figure.subplots()


def _machine(report: Stored) -> str:
    machine = report["machine"]
    return f"{machine.get('gpu') or machine['cpu']}, commit {machine['commit']}"


# Latency beside best effort ---------------------------------------------------------------------

LARGEST = 3  # the ratio at which bars end: what matters are the small ones
AIMS = {
    ("closed", "matmul"): 1.10,
    ("closed", "copies"): 1.25,
    ("Poisson", "matmul"): 1.25,
    ("Poisson", "copies"): 1.25,
}


def qos(report: Stored) -> Figure:
    """Draw a row for each request, and two columns for each load: its latency, what is kept."""
    results = Results(report)
    rows, ways = len(results.groups), range(len(results.ways))
    widths = [width for load in results.loads for width in (2, 0.1 if load == "nothing" else 1)]
    figure = Figure((1.2 * sum(widths), BAR * (len(ways) + 1) * rows + 1.2), layout="constrained")
    figure.suptitle(
        f"Latency of requests beside best effort, by way to share the device ({_machine(report)})\n"
        "blue: to that alone on one stream; circle: the same beside an .item() loop; green: aim; "
        "orange: what best effort keeps of its rate alone",
        size="medium",
    )
    grid = figure.subplots(
        rows, len(widths), squeeze=False, sharex="col", sharey=True, width_ratios=widths
    )
    for line, group in enumerate(results.groups):
        for column, load in enumerate(results.loads):
            ratios, kept = grid[line][2 * column : 2 * column + 2]
            for y, way in enumerate(results.ways):
                row = results.row(group, way, load)
                with_items = results.row_with_items(group, way, load)
                beside_items = results.ratio(with_items) if with_items else None
                _ratio(ratios, y, results.ratio(row), beside_items)
                if row["kept"] != "":
                    bar = kept.barh(y, min(row["kept"], 1), 0.7, color="C1")
                    kept.bar_label(bar, [f"{row['kept']:.0%}"], padding=2)
            if group[0] == "graph" and (aim := AIMS.get((group[1], load))):
                ratios.axvline(aim, color="C2", lw=1)
            ratios.set_title(f"beside {load}" if line == 0 else "", loc="left")
            ratios.set_xlim(0, 1.35 * LARGEST)
            ratios.set_xticks(range(LARGEST + 1))
            ratios.tick_params("y", length=0)
            kept.set_xlim(0, 1.6)
            kept.set_axis_off()
        grid[line][0].set_yticks(ways, results.ways)
        grid[line][0].set_ylabel(f"{', '.join(group)}\n{SHOWN[group[0]]}")
    grid[0][0].invert_yaxis()
    return figure


def _ratio(axes: Axes, y: int, ratio: float, beside_items: float | None) -> None:
    axes.barh(y, min(ratio, LARGEST), 0.7, color="C0")
    axes.text(1.05 * LARGEST, y, f"{ratio:.2f}", va="center")
    if beside_items:
        axes.plot(
            min(beside_items, LARGEST),
            y,
            "o",
            markerfacecolor="white",
            markeredgecolor="black",
            markersize=4,
        )


# What is drawn of each story ---------------------------------------------------------------------


def evict(report: Stored) -> Figure:
    """Draw the rates of the set of tensors that all are compared on: out, in, and both."""
    whose = {
        "pinned": "pinned copies",
        ".": "torch",
        "torch_": "torch_memory_saver",
        "": "contexts",
    }
    rows = sorted(report["rows"], key=lambda row: str(row["to"] or row["what"]), reverse=True)

    def lengths(row: Row) -> Row:
        if row["tensors"] != "few large" or row["GiB/s"] == "":
            return {}
        name = next(name for start, name in whose.items() if row["what"].startswith(start))
        return {name: row["GiB/s"]}

    title = "Moving out of VRAM and back, GiB/s"
    return bars({**report, "rows": rows}, title, lambda row: str(row["what"]), lengths)


PLOTS: dict[str, Callable[[Stored], Figure]] = {
    "alloc": alloc,
    "session": partial(
        bars,
        title="What a session costs, µs",
        groups=lambda row: row["what"],
        lengths=lambda row: {"": row["us"]},
    ),
    "scale": partial(
        bars,
        title="What one takes where there are many",
        groups=lambda row: f"{row['what']}, {row['unit']}",
        lengths=lambda row: {f"{row['count']}": row["ours"]},
    ),
    "oversubscribe": partial(
        bars,
        title="Requests a second, to everything resident",
        groups=lambda row: f"{row['VRAM']} the VRAM, {row['order']}",
        lengths=lambda row: {row["way"]: row["failure"] or row["ratio"]},
        digits=".2f",
    ),
    "models": partial(
        bars,
        title="Rates to torch's own allocator; of several at once to one after the other",
        groups=lambda row: row["work"],
        lengths=lambda row: (
            {}
            if row["at once"] == 1
            else {row["way"]: row["failure"] or row["rate" if row["at once"] else "to native"]}
        ),
    ),
    "fragmentation": partial(
        bars,
        title="Reserved at the peak beyond what was live, %",
        groups=lambda row: row["trace"],
        lengths=lambda row: {row["allocator"]: row["failure"] or 100 * (row["ratio"] - 1)},
        digits=".1f",
    ),
    "evict": evict,
    "qos": qos,
    "borders": partial(
        bars,
        title="p99 of a decode, ms",
        groups=lambda row: (
            f"beside {row['beside']}, input {row['input']}, .item() {row['.item() loop']}"
        ),
        lengths=lambda row: {row["way"]: row["p99"]},
    ),
    "overlap": overlap,
}
