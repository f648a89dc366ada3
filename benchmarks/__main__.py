"""Command line of the benchmarks."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.report import Reports, save
from benchmarks.stories import STORIES, run, run_each


def main() -> None:
    """Run one story or all of them, and show their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("story", choices=(*STORIES, "all"))
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw them, with matplotlib")
    arguments = parser.parse_args()
    # Before anything is measured, in case that it is not installed.
    plots = import_module("benchmarks.plots") if arguments.plots else None
    reports: Reports = {}
    failed: list[str] = []
    results = (
        run_each(STORIES, arguments.quick)
        if arguments.story == "all"
        else [(arguments.story, run(arguments.story, arguments.quick))]
    )
    for story, found in results:
        if found is None:
            failed.append(story)
            continue
        reports |= found
        if arguments.json:
            save(arguments.json, reports)
        if plots:
            plots.draw(found, arguments.plots)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
