"""compute-sanitizer's memcheck over a short program."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_memcheck_finds_nothing() -> None:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/compute-sanitizer"
    sanitizer = shutil.which("compute-sanitizer") or str(toolkit)
    result = subprocess.run(
        [
            *(sanitizer, "--tool", "memcheck", "--error-exitcode", "9"),
            *(sys.executable, "-m", "tests.gpu.short_program"),
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
