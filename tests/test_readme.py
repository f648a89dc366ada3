"""What the README says is what the repository has."""

import re
from pathlib import Path

from benchmarks.plots import draw
from benchmarks.readme import PICTURES, RESULTS, filled
from benchmarks.report import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_committed_results() -> None:
    assert filled(README, load(RESULTS)) == README, "run: python -m benchmarks.readme"


def test_pictures_are_those_of_the_committed_results(tmp_path: Path) -> None:
    draw(load(RESULTS), tmp_path)
    drawn, committed = (
        {path.name: path.read_text() for path in folder.iterdir()}
        for folder in (tmp_path, PICTURES)
    )
    assert drawn == committed, "run: python -m benchmarks.readme"


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
