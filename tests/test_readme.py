"""What the README says is what the repository has."""

import json
import re
from pathlib import Path

from benchmarks import picture, qos_picture
from benchmarks.picture import RESULTS
from benchmarks.readme import filled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_committed_results() -> None:
    assert filled(README) == README, "run: python -m benchmarks.readme"


def test_pictures_are_those_of_the_committed_results() -> None:
    for name, module in (("overlap", picture), ("qos", qos_picture)):
        report = json.loads((RESULTS / f"{name}-h100.json").read_text())
        drawn = (RESULTS / f"{name}-h100.svg").read_text()
        assert module.drawn(report) == drawn, f"run: python -m {module.__name__}"


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
