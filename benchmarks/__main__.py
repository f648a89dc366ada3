"""Command line of the benchmarks."""

import argparse
from importlib import import_module
from pathlib import Path

STORIES = ("alloc", "borders", "evict", "fragmentation", "models", "overlap", "qos", "session")


def main() -> None:
    """Run one story and show its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("story", choices=STORIES)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures")
    arguments = parser.parse_args()
    report = import_module(f"benchmarks.{arguments.story}").run(arguments.quick)
    report.show()
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
