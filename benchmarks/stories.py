"""The stories, and all of them one after the other, each in a process of its own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.progress import say, track_writers
from benchmarks.provenance import commit
from benchmarks.report import Report, Reports, load

STORIES = (
    "alloc",
    "scale",
    "session",
    "models",
    "fragmentation",
    "evict",
    "qos",
    "oversubscribe",
    "borders",
    "overlap",
)
# What they measure is not there without CUDA.
ON_CUDA_ONLY = ("borders", "overlap")


def run(story: str, quick: bool) -> Reports:
    """Run one story and show its report; end the program if this machine cannot run it."""
    if why := _unavailable(story):
        sys.exit(why)
    report: Report = import_module(f"benchmarks.{story}").run(quick)
    report.show()
    return report.stored()


def run_each(stories: Sequence[str], quick: bool) -> Iterator[tuple[str, Reports | None]]:
    """Run the stories that this machine can; yield what each reports, or None if it failed.

    They initialise and shut down allocators, so each is a process, and a crash is only its own.
    """
    # What a caller saves in between would make the work tree dirty.
    environment = {**os.environ, "PYGPUKIT_COMMIT": commit()}
    for story in track_writers(stories, "stories"):
        if why := _unavailable(story):
            say(why)
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "report.json")
            command = [sys.executable, "-m", "benchmarks", story, "--json", str(path)]
            start = time.monotonic()
            result = subprocess.run(
                [*command, "--quick"] if quick else command, env=environment, check=False
            )
            say(f"{story} took {time.monotonic() - start:.1f} s")
            yield story, None if result.returncode else load(path)


def _unavailable(story: str) -> str:
    """Return why this machine cannot run a story, or nothing."""
    if story in ON_CUDA_ONLY and not torch.cuda.is_available():
        return f"{story} needs a GPU"
    return ""
