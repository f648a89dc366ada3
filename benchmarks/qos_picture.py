"""Draws the committed result of ``qos``: ``python -m benchmarks.qos_picture``."""

import json
from typing import Any

from benchmarks.picture import RESULTS
from benchmarks.qos_results import Results

LEFT, TOP, ROW, HEADER = 160, 62, 20, 26
COLUMN, RATIO, KEPT = 200, 80, 40  # the width of a load's column, and of the bars in it
LARGEST = 3  # the ratio at which bars end: what matters are the small ones
RATIO_COLOUR, KEPT_COLOUR, ITEM_COLOUR, AIM_COLOUR = "#3b6ea8", "#c8692f", "#111111", "#2a8a4a"
AIMS = {
    ("closed", "matmul"): 1.10,
    ("closed", "copies"): 1.25,
    ("Poisson", "matmul"): 1.25,
    ("Poisson", "copies"): 1.25,
}


def drawn(report: dict[str, Any]) -> str:
    """Return an SVG: a row for each request and way, and a column for each load beside it."""
    results = Results(report)
    width = LEFT + COLUMN * len(results.loads)
    block = HEADER + ROW * len(results.ways)
    height = TOP + block * len(results.groups) + 10
    machine = report["machine"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(
            10,
            18,
            f"p99 of requests beside best effort, by way to share the device "
            f"({machine['gpu']}, commit {machine['commit']})",
        ),
        _bar(10, 27, 12, RATIO_COLOUR),
        _text(26, 37, f"p99, to that alone on one stream: from 1 to {LARGEST}"),
        _circle(322, 33),
        _text(332, 37, "the same beside an .item() loop"),
        _bar(540, 27, 12, KEPT_COLOUR),
        _text(556, 37, "what best effort keeps of its rate alone"),
        f'<path d="M 806 26 v 14" stroke="{AIM_COLOUR}" stroke-width="2"/>',
        _text(814, 37, "aim"),
    ]
    for column, load in enumerate(results.loads):
        parts.append(_text(LEFT + COLUMN * column, TOP, f"beside {load}", bold=True))
    for index, group in enumerate(results.groups):
        top = TOP + block * index + HEADER
        parts.append(_text(10, top - 6, ", ".join(group), bold=True))
        for line, way in enumerate(results.ways):
            y = top + ROW * line
            parts.append(_text(10, y + 14, way))
            for column, load in enumerate(results.loads):
                x = LEFT + COLUMN * column
                row = results.row(group, way, load)
                with_items = results.row_with_items(group, way, load)
                parts += _ratio(x, y, row["p99 ratio"])
                if with_items:
                    parts.append(_circle(x + _length(with_items["p99 ratio"]), y + 10))
                if row["kept"] != "":
                    parts += _kept(x + RATIO + 45, y, row["kept"])
        for column, load in enumerate(results.loads):
            if group[0] == "graph" and (aim := AIMS.get((group[1], load))):
                x = LEFT + COLUMN * column + _length(aim)
                parts.append(
                    f'<path d="M {x:.1f} {top} v {ROW * len(results.ways)}" '
                    f'stroke="{AIM_COLOUR}" stroke-width="1"/>'
                )
    return "\n".join([*parts, "</svg>", ""])


def _length(ratio: float) -> float:
    return RATIO * min(max(ratio - 1, 0), LARGEST - 1) / (LARGEST - 1)


def _ratio(x: float, y: float, ratio: float) -> list[str]:
    length = _length(ratio)
    return [_bar(x, y + 4, length, RATIO_COLOUR), _text(x + length + 6, y + 14, f"{ratio:.2f}")]


def _kept(x: float, y: float, kept: float) -> list[str]:
    length = KEPT * min(kept, 1)
    return [_bar(x, y + 4, length, KEPT_COLOUR), _text(x + length + 4, y + 14, f"{kept:.0%}")]


def _bar(x: float, y: float, width: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="12" fill="{colour}"/>'
    )


def _circle(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="white" stroke="{ITEM_COLOUR}"/>'


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight}>{text}</text>'


def main() -> None:
    """Draw the committed result."""
    report = json.loads((RESULTS / "qos-h100.json").read_text())
    (RESULTS / "qos-h100.svg").write_text(drawn(report))


if __name__ == "__main__":
    main()
