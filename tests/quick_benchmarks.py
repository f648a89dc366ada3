"""What one quick run of all benchmarks left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class QuickBenchmarks:
    """The reports by story, the folder of their pictures, and what was written while it ran."""

    reports: dict[str, dict[str, Any]]
    pictures: Path
    stdout: str
    stderr: str


def benchmarks(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks``, with changes to the environment."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_all(folder: Path) -> QuickBenchmarks:
    """Run them, and leave the files in the folder."""
    figures, pictures = folder / "figures.json", folder / "pictures"
    result = benchmarks("all", "--quick", "--json", str(figures), "--plots", str(pictures))
    assert result.returncode == 0, result.stdout + result.stderr
    reports = json.loads(figures.read_text())
    return QuickBenchmarks(reports, pictures, result.stdout, result.stderr)
