"""What the README says is what the repository has."""

import json
import re
from pathlib import Path

from benchmarks.picture import RESULTS, drawn
from benchmarks.readme import filled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_committed_results() -> None:
    assert filled(README) == README, "run: python -m benchmarks.readme"


def test_pictures_are_those_of_the_committed_results() -> None:
    report = json.loads((RESULTS / "overlap-h100.json").read_text())
    picture = (RESULTS / "overlap-h100.svg").read_text()
    assert drawn(report) == picture, "run: python -m benchmarks.picture"


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
