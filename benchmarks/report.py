"""What every story's result carries, and how it is shown and stored."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import commit, driver, versions

# A report as it is stored, and those of a file, by story.
Stored = dict[str, Any]
Reports = dict[str, Stored]


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    gpu = (
        {"gpu": torch.cuda.get_device_name(), "driver": driver()}
        if torch.cuda.is_available()
        else {}
    )
    return {
        **gpu,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions(),
    }


@dataclass
class Report:
    """One story's result: rows of named figures, and the machine they belong to."""

    story: str
    unit: str
    columns: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=machine)

    def show(self) -> None:
        """Print it as a table."""
        table = Table(title=f"{self.story} ({self.unit})")
        for column in self.columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*(shown(row[column]) for column in self.columns))
        console = Console(width=130)
        console.print(table)
        console.print("  ".join(f"{key} {value}" for key, value in self.machine.items()))

    def stored(self) -> Reports:
        """Return it as it is stored."""
        return {self.story: asdict(self)}


def save(path: Path, reports: Reports) -> None:
    """Write reports as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(reports, indent=2) + "\n")


def load(path: Path) -> Reports:
    """Read what ``save`` has written."""
    reports: Reports = json.loads(path.read_text())
    return reports


def shown(value: Any) -> str:
    """Return a figure with three digits, anything else as it is."""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


def size_name(size: int) -> str:
    """Return a number of bytes in whole GiB, MiB or KiB, if it has any."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size // scale} {unit}"
    return f"{size} B"
