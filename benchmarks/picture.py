"""Draws the kernels of ``overlap`` from the committed result: ``python -m benchmarks.picture``."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WIDTH, ROW, LEFT, TOP = 900, 46, 90, 30
COLOURS = ("#3b6ea8", "#c8692f")


def drawn(report: dict[str, Any]) -> str:
    """Return an SVG: a row for each stream, a bar for each kernel, time to the right."""
    rows = report["rows"]
    end = max(row["start"] + row["duration"] for row in rows)
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    scale = (WIDTH - LEFT - 10) / end
    height = TOP + ROW * len(streams) + 40
    machine = report["machine"]
    title = (
        f"Kernels of two models in two contexts, submitted by one thread: {machine['overlapped']} "
        f"of the busy time both run ({machine['gpu']}, commit {machine['commit']})"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="18">{title}</text>',
    ]
    for index, stream in enumerate(streams):
        y = TOP + ROW * index
        parts.append(f'<text x="10" y="{y + 26}">stream {stream}</text>')
        for row in rows:
            if row["stream"] != stream:
                continue
            x, width = LEFT + row["start"] * scale, max(row["duration"] * scale, 0.5)
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 6}" width="{width:.1f}" height="{ROW - 14}" '
                f'fill="{COLOURS[index % len(COLOURS)]}" stroke="white" stroke-width="0.5"/>'
            )
    bottom = TOP + ROW * len(streams)
    for tick in range(6):
        x = LEFT + tick * end / 5 * scale
        parts.append(f'<text x="{x:.0f}" y="{bottom + 22}">{tick * end / 5000:.1f} ms</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Draw the committed result."""
    report = json.loads((RESULTS / "overlap-h100.json").read_text())
    (RESULTS / "overlap-h100.svg").write_text(drawn(report))


if __name__ == "__main__":
    main()
