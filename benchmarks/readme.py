"""Writes the tables of README.md from the committed results: ``python -m benchmarks.readme``."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def alloc_table() -> str:
    """Allocate + free on the host device, as Markdown."""
    report = json.loads((RESULTS / "alloc-host.json").read_text())
    lines = [
        "| size | threads | stock, ns | in a session, ns | ratio |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {_size(row['bytes'])} | {row['threads']} | {row['stock']:.0f} "
            f"| {row['session']:.0f} | {row['ratio']:.2g} |"
        )
    machine = report["machine"]
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, medians, a context "
        f"for each thread, commit {machine['commit']}.",
    ]
    return "\n".join(lines)


def _size(size: int) -> str:
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size // scale} {unit}"
    return f"{size} B"


TABLES: dict[str, Any] = {"alloc": alloc_table}


def filled(text: str) -> str:
    """Return ``text`` with every table between its marks replaced by the one of the results."""
    for name, table in TABLES.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        lines = table().replace("\\", r"\\")
        text, count = marks.subn(rf"\g<1>{lines}\n\g<2>", text)
        if count != 1:
            raise ValueError(f"README.md must have the marks of the table {name!r} once")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
