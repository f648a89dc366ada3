"""Programs in processes of their own."""

import os
import subprocess
import sys
import textwrap


def run_python(code: str, **environment: str) -> str:
    """What the program prints; it has to end without an error within two minutes."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()
