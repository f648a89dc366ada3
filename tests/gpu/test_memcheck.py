"""compute-sanitizer's memcheck over short programs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("program", ["short_program", "short_eviction"])
def test_memcheck_finds_nothing(program: str) -> None:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/compute-sanitizer"
    sanitizer = shutil.which("compute-sanitizer") or str(toolkit)
    result = subprocess.run(
        [
            *(sanitizer, "--tool", "memcheck", "--error-exitcode", "9"),
            *(sys.executable, "-m", f"tests.gpu.{program}"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout
    assert "done" in result.stdout
