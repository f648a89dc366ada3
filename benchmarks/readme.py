"""Writes the tables of README.md and the pictures: ``python -m benchmarks.readme``.

Both are those of the committed results.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plots import draw
from benchmarks.qos_results import MOVES, SHOWN, Group, Results
from benchmarks.report import Reports, Stored, load, size_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/h100.json"
PICTURES = RESULTS.with_suffix("")

Row = dict[str, Any]

HEADS = {"session": "in a session", "stock": "torch native"}


def alloc_table(report: Stored) -> str:
    """Allocate + free on a GPU, on one thread and on the most."""
    names = [
        "session",
        "stock",
        *(name for name in report["columns"] if name[:4] in ("torc", "RMM ")),
    ]
    most = max(row["threads"] for row in report["rows"])
    header = "| size | threads | " + " | ".join(HEADS.get(name, name) for name in names) + " |"
    rows = [
        f"| {size_name(row['bytes'])} | {row['threads']} | "
        + " | ".join(_nanoseconds(row[name]) for name in names)
        + " |"
        for row in report["rows"]
        if row["threads"] in (1, most)
    ]
    return _table(header, rows, report, "medians in ns")


def scale_table(report: Stored) -> str:
    """What one context or block takes where there are more and more of them."""
    lines: dict[str, list[str]] = {}
    for row in report["rows"]:
        beside = f" ({row['ratio']:.2f})" if row["ratio"] != "" else ""
        cell = f"{row['count']:,}: {row['ours']:.3g}{beside}"
        lines.setdefault(f"{row['what']}, {row['unit']}", []).append(cell)
    rows = [f"| {what} | {', '.join(cells)} |" for what, cells in lines.items()]
    return _table("| | of how many: figure (to torch's) |", rows, report, "one turn")


def models_table(report: Stored) -> str:
    """One model at a time, in a session and on peers."""
    lines: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        if row["at once"] == "":
            lines.setdefault(row["work"], {})[row["way"]] = row
    peers = [way for way in next(iter(lines.values())) if way not in ("session", "torch native")]

    def rate(row: Row) -> str:
        return f"{row['rate']:.3g} {row['unit']} ({row['quartiles']})"

    header = "| | torch native | session, to outside | session, to native | "
    header += " | ".join(f"{peer}, to native" for peer in peers) + " |"
    rows = [
        f"| {work} | {_cell(ways['torch native'], rate)} "
        f"| {_ratio(ways['session'], 'to outside')} | "
        + " | ".join(_ratio(ways[way], "to native") for way in ("session", *peers))
        + " |"
        for work, ways in lines.items()
    ]
    return _table(header, rows, report)


def at_once_table(report: Stored) -> str:
    """Several models at once: what they get done, and what more without the GIL."""
    lines: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        if row["at once"] not in ("", 1):
            lines.setdefault(row["work"], {})[row["way"]] = row

    def gain(row: Row) -> str:
        kept = " + ".join(f"{part:.2f}" for part in row["kept"])
        gil = "" if row["GIL at most"] == "" else f", GIL {row['GIL at most']:.2f}"
        return f"{row['rate']:.2f} ({kept}){gil}"

    ways = list(next(iter(lines.values())))
    header = "| at once | " + " | ".join(ways) + " |"
    rows = [
        f"| {work} | " + " | ".join(_cell(row, gain) for row in line.values()) + " |"
        for work, line in lines.items()
    ]
    return _table(header, rows, report)


def borders_table(report: Stored) -> str:
    """Latency beside best effort, and results that were read too early."""
    header = "| way | beside | input made | `.item()` loop | p50, ms | p90, ms | wrong results |"
    rows = [
        f"| {row['way']} | {row['beside']} | {row['input']} | {row['.item() loop']} "
        f"| {row['p50']:.1f} | {row['p90']:.1f} | {row['wrong results']} |"
        for row in report["rows"]
    ]
    return _table(header, rows, report)


def session_table(report: Stored) -> str:
    """Entering and leaving, and awaits."""
    header = "| what | µs | quartiles |"
    rows = [f"| {row['what']} | {row['us']:.2f} | {row['us spread']} |" for row in report["rows"]]
    return _table(header, rows, report)


def evict_table(report: Stored) -> str:
    """Out and in, as rates and as parts of the pinned copies' rates."""
    sets = list(dict.fromkeys(row["tensors"] for row in report["rows"] if row["GiB/s"] != ""))
    cells: dict[str, dict[str, str]] = {}
    for row in report["rows"]:
        if row["GiB/s"] == "":
            continue
        ratio = f" ({row['ratio']:.2f})" if row["to"] else ""
        against = f", to {row['to']}" if row["to"] else ""
        line = cells.setdefault(f"{row['what']}{against}", {})
        line[row["tensors"]] = f"{row['GiB/s']:.3g}{ratio}"
    header = "| GiB/s (ratio) | " + " | ".join(sets) + " |"
    rows = [
        f"| {what} | " + " | ".join(line.get(name, "") for name in sets) + " |"
        for what, line in cells.items()
    ]
    return _table(header, rows, report)


def fragmentation_table(report: Stored) -> str:
    """Reserved to live, for every allocator."""
    names = list(dict.fromkeys(row["allocator"] for row in report["rows"]))
    lines: dict[str, dict[str, str]] = {}
    for row in report["rows"]:
        cell = "failed" if row["failure"] else f"{row['ratio']:.3f}"
        lines.setdefault(f"{row['trace']} | {row['live'] / 1024:.2f}", {})[row["allocator"]] = cell
    header = "| trace | peak live, GiB | " + " | ".join(names) + " |"
    rows = [
        f"| {trace} | " + " | ".join(line[name] for name in names) + " |"
        for trace, line in lines.items()
    ]
    return _table(header, rows, report, "peak reserved to peak live")


def qos_table(report: Stored) -> str:
    """Latency beside best effort, for every way to share the device."""
    results = Results(report)

    def cell(group: Group, way: str, load: str) -> str:
        row, with_items = results.row(group, way, load), results.row_with_items(group, way, load)
        ratios = " / ".join(f"{results.ratio(each):.2f}" for each in (row, with_items) if each)
        return ratios if row["kept"] == "" else f"{ratios} ({row['kept']:.0%})"

    header = "| request | way | SMs | " + " | ".join(f"beside {it}" for it in results.loads) + " |"
    sms = {
        way: results.row(results.groups[0], way, results.loads[0])["SMs"] for way in results.ways
    }
    rows = [
        f"| {', '.join(group)}, {SHOWN[group[0]]} | {way} | {sms[way]} | "
        + " | ".join(cell(group, way, load) for load in results.loads)
        + " |"
        for group in results.groups
        for way in results.ways
    ]
    table = _table(header, rows, report, "percentiles")
    # Results of before it was measured have no moving.
    return f"{table}\n\n{_moving_table(report, results)}" if results.moving else table


def _moving_table(report: Stored, results: Results) -> str:
    percentiles = ("p50", "p90", "p99")
    heads = [
        "beside moves",
        "requests",
        *(f"{name}, ms (to alone)" for name in percentiles),
        "moved, GB/s (of alone)",
    ]
    rows: list[str] = []
    for request, found in results.moving.items():
        row, alone = found[MOVES], found["nothing"]
        cells = [f"{row[name]:.3g} ({row[name] / alone[name]:.2f})" for name in percentiles]
        cells.append(f"{row['GB/s']:.3g} ({row['kept']:.0%})")
        rows.append(f"| {request}, closed | {row['count']} | " + " | ".join(cells) + " |")
    return _table("| " + " | ".join(heads) + " |", rows, report, "percentiles")


def oversubscribe_table(report: Stored) -> str:
    """More models than fit, served in every way; a line for each."""
    cases = list(dict.fromkeys(f"{row['VRAM']}, {row['order']}" for row in report["rows"]))
    lines: dict[str, dict[str, str]] = {}
    for row in report["rows"]:
        cell = "failed"
        if not row["failure"]:
            ratio = f" ({row['ratio']:.2f})" if row["ratio"] != "" else ""
            times = f"{row['p50']:.3g} / {row['p99']:.3g} of {row['count']}"
            cell = f"{row['requests/s']:.3g}{ratio}, {times}"
        lines.setdefault(row["way"], {})[f"{row['VRAM']}, {row['order']}"] = cell
    header = "| requests/s (ratio), p50 / p99 in ms | " + " | ".join(cases) + " |"
    rows = [
        f"| {way} | " + " | ".join(line.get(case, "") for case in cases) + " |"
        for way, line in lines.items()
    ]
    return _table(header, rows, report, "of how many requests")


def _nanoseconds(time: float | str) -> str:
    if isinstance(time, float):
        return f"{time:.0f}"
    return "failed" if time else ""


def _cell(row: Row, text: Callable[[Row], str]) -> str:
    return "failed" if row["failure"] else text(row)


def _ratio(row: Row, column: str) -> str:
    return _cell(row, lambda row: f"{row[column]:.3f}" if row[column] != "" else "")


def _table(header: str, rows: list[str], report: Stored, of: str = "medians") -> str:
    machine = report["machine"]
    return "\n".join(
        [
            header,
            "|" + "---:|" * (header.count("|") - 1),
            *rows,
            "",
            f"{machine['gpu']}, {machine['cores']} cores, torch {machine['torch']}, {of}, "
            f"commit {machine['commit']}.",
        ]
    )


# Of which story each is.
TABLES: dict[str, tuple[str, Callable[[Stored], str]]] = {
    "models": ("models", models_table),
    "several": ("models", at_once_table),
    "alloc": ("alloc", alloc_table),
    "session": ("session", session_table),
    "borders": ("borders", borders_table),
    "fragmentation": ("fragmentation", fragmentation_table),
    "evict": ("evict", evict_table),
    "qos": ("qos", qos_table),
    "scale": ("scale", scale_table),
    "oversubscribe": ("oversubscribe", oversubscribe_table),
}


def filled(text: str, reports: Reports) -> str:
    """Return ``text`` with every table between its marks replaced by the one of the results."""
    for name, (story, table) in TABLES.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        lines = table(reports[story]).replace("\\", r"\\")
        text, count = marks.subn(rf"\g<1>{lines}\n\g<2>", text)
        if count != 1:
            raise ValueError(f"README.md must have the marks of the table {name!r} once")
    return text


def main() -> None:
    """Write both."""
    reports = load(RESULTS)
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), reports))
    for old in PICTURES.glob("*.svg"):
        old.unlink()
    draw(reports, PICTURES)


if __name__ == "__main__":
    main()
