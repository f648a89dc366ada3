"""How far a run is, told on stderr, so that stdout has the tables only."""

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from rich import progress
from rich.console import Console

SECONDS = 5.0  # between two lines where there is no terminal

Step = TypeVar("Step")


def track(steps: Collection[Step], what: str) -> Iterator[Step]:
    """Yield the steps, with a bar; without a terminal with a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        # Drawn between the steps only: a thread that draws would be measured with them.
        yield from progress.track(
            steps, what, console=console, transient=True, auto_refresh=False, total=len(steps)
        )
        return
    last = -SECONDS
    for number, step in enumerate(steps, 1):
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            say(f"{what}: {number} of {len(steps)}")
        yield step


def track_writers(steps: Collection[str], what: str) -> Iterator[str]:
    """Yield steps that write to the terminal themselves, with a line for each and no moving bar."""
    console = Console(stderr=True)
    bar = progress.Progress(
        "{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), console=console
    )
    task = bar.add_task(what, total=len(steps))
    for number, step in enumerate(steps):
        if console.is_terminal:
            bar.update(task, completed=number, description=f"{what}: {step}")
            console.print(bar)
        else:
            say(f"{what}: {step}, {number + 1} of {len(steps)}")
        yield step


def say(line: str) -> None:
    """Write a line to stderr."""
    print(line, file=sys.stderr, flush=True)
