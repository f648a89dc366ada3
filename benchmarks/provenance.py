"""Which state of the repository a result was obtained with."""

import os
import subprocess


def commit() -> str:
    """The commit, marked if there were changes on top, or what ``PYGPUKIT_COMMIT`` says it is."""
    if told := os.environ.get("PYGPUKIT_COMMIT"):
        return told
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return described or "unknown"
