"""The frame of the benchmarks: command line, what is stored, progress, pictures."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import plots, progress, provenance, stories
from benchmarks.readme import evict_table
from benchmarks.report import Report, load, save, shown, size_name
from tests.quick_benchmarks import QuickBenchmarks, benchmarks

HERE = [name for name in stories.STORIES if name not in stories.ON_CUDA_ONLY]
KEYS = {"story", "unit", "columns", "rows", "machine"}

# Command line ------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    command_line.main()


def test_an_unknown_story_is_refused_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "aloc")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in (*stories.STORIES, "all"))


@pytest.mark.parametrize("story", stories.ON_CUDA_ONLY)
def test_a_story_that_needs_a_gpu_says_so_in_one_line(
    story: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, story, "--json", str(tmp_path / "figures.json"))
    assert caught.value.code == f"{story} needs a GPU"
    assert not list(tmp_path.iterdir())


def test_all_reports_what_works_and_names_what_failed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The process of a story that is not there fails.
    monkeypatch.setattr(command_line, "STORIES", ("gone", "session"))
    figures = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "all", "--quick", "--json", str(figures))
    assert caught.value.code == "failed: gone"
    assert list(load(figures)) == ["session"]
    output = capfd.readouterr()
    assert "context_session(ctx)" in output.out
    for story in ("gone", "session"):
        assert f"{story} took " in output.err


def test_one_story_is_stored_in_the_format_of_all_and_needs_no_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('there is no matplotlib')\n")
    figures = tmp_path / "figures.json"
    here = {"PYTHONPATH": str(tmp_path)}
    result = benchmarks("session", "--quick", "--json", str(figures), **here)
    assert result.returncode == 0, result.stderr
    (report,) = load(figures).values()
    assert report["story"] == "session"
    assert report.keys() == KEYS

    result = benchmarks("session", "--quick", "--plots", str(tmp_path / "pictures"), **here)
    assert result.returncode == 1
    assert "there is no matplotlib" in result.stderr
    assert result.stdout == "", "it was measured before"


# All of them ------------------------------------------------------------------------------------


def test_every_story_that_this_machine_can_run_reports(quick_benchmarks: QuickBenchmarks) -> None:
    assert list(quick_benchmarks.reports) == HERE
    for story, report in quick_benchmarks.reports.items():
        assert report.keys() == KEYS
        assert report["story"] == story
        assert report["rows"]
        for row in report["rows"]:
            assert row.keys() >= set(report["columns"])
        assert f"{story} ({report['unit']})" in quick_benchmarks.stdout


def test_stdout_has_the_tables_only_and_stderr_how_far_it_is(
    quick_benchmarks: QuickBenchmarks,
) -> None:
    output = quick_benchmarks
    for number, story in enumerate(stories.STORIES, 1):
        assert f"stories: {story}, {number} of {len(stories.STORIES)}\n" in output.stderr
        if story in stories.ON_CUDA_ONLY:
            assert f"{story} needs a GPU\n" in output.stderr
        else:
            assert f"\n{story} took " in output.stderr
    assert "\x1b" not in output.stderr
    assert not set(output.stderr.splitlines()) & set(output.stdout.splitlines()) - {""}


def test_what_reports_say_of_the_machine(quick_benchmarks: QuickBenchmarks) -> None:
    machines = [report["machine"] for report in quick_benchmarks.reports.values()]
    for machine in machines:
        assert machine["torch"] == torch.__version__
        assert machine["transformers"] == version("transformers")
    assert len({machine["commit"] for machine in machines}) == 1


def test_moves_are_also_timed_beside_a_session(quick_benchmarks: QuickBenchmarks) -> None:
    report = quick_benchmarks.reports["evict"]
    rows = {row["what"]: row for row in report["rows"] if row["tensors"] == "few large"}
    for what in ("out, changed", "out, unchanged", "in"):
        row = rows[f"{what}, beside a session"]
        assert row["GB/s"] > 0
        assert row["GiB copied"] == rows[what]["GiB copied"]
        assert row["to"] == what
        assert row["ratio"] == pytest.approx(row["GB/s"] / rows[what]["GB/s"])
    table = evict_table(report | {"machine": report["machine"] | {"gpu": "GPU"}})
    assert "\n| in, beside a session, to in | " in table


# Reports ----------------------------------------------------------------------------------------


def test_reports_are_stored_as_they_are(tmp_path: Path) -> None:
    report = Report("a", "ms", ["x"], [{"x": 1.5}], {"gpu": "G"})
    path = tmp_path / "new" / "figures.json"
    save(path, report.stored())
    stored = {"story": "a", "unit": "ms", "columns": ["x"], "rows": [{"x": 1.5}]}
    assert load(path) == {"a": stored | {"machine": {"gpu": "G"}}}


def test_figures_are_shown_with_three_digits() -> None:
    assert [shown(value) for value in (0.12345, 12.345, 1234.5, 7, "x")] == [
        "0.123", "12.3", "1234", "7", "x",
    ]  # fmt: skip
    sizes = [512, 1 << 10, 1536, 3 << 20]
    assert [size_name(size) for size in sizes] == ["512 B", "1 KiB", "1 KiB", "3 MiB"]


# Provenance -------------------------------------------------------------------------------------


def test_the_driver_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.driver() == "unknown"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.159.04\n")
    program.chmod(0o755)
    assert provenance.driver() == "580.159.04"
    program.write_text("#!/bin/sh\necho failed to talk to the driver\nexit 9\n")
    assert provenance.driver() == "unknown"


def test_versions_are_of_what_is_imported_whatever_it_is_distributed_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = provenance.versions()
    assert before["accelerate"] == version("accelerate")
    folder = tmp_path / "rmm_cu13-26.2.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: rmm-cu13\nVersion: 26.2.0\n")
    (folder / "top_level.txt").write_text("rmm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert provenance.versions() == before | {"rmm": "26.2.0"}


# Progress ---------------------------------------------------------------------------------------


class Clock:
    """Time that passes when a step takes some."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    done = []
    for step in progress.track(range(10), "work"):
        done.append(step)
        clock.now += 2
    assert done == list(range(10))
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "work: 1 of 10",
        "work: 4 of 10",
        "work: 7 of 10",
        "work: 10 of 10",
    ]


def test_in_a_terminal_there_is_a_bar_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert list(progress.track(range(3), "work")) == [0, 1, 2]
    output = capsys.readouterr()
    assert output.out == ""
    assert "100%" in output.err
    assert list(progress.track_writers(["a", "b"], "stories")) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert ["stories: a" in lines[0], "stories: b" in lines[1]] == [True, True]
    assert len(lines) == 2


# Pictures ---------------------------------------------------------------------------------------


def test_every_story_has_a_picture(quick_benchmarks: QuickBenchmarks) -> None:
    assert plots.PLOTS.keys() == set(stories.STORIES)
    assert sorted(path.stem for path in quick_benchmarks.pictures.iterdir()) == sorted(HERE)


def test_the_same_figures_give_the_same_picture(
    quick_benchmarks: QuickBenchmarks, tmp_path: Path
) -> None:
    plots.draw(quick_benchmarks.reports, tmp_path)
    for path in quick_benchmarks.pictures.iterdir():
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_bars_have_names_figures_and_failures(tmp_path: Path) -> None:
    rows = [
        {"trace": trace, "allocator": allocator, "ratio": ratio, "failure": failure}
        for trace, allocator, ratio, failure in (
            ("long", "ours", 1.25, ""),
            ("long", "theirs", "", "out of memory"),
            ("short", "ours", 1.5, ""),
            ("short", "theirs", 1.875, ""),
        )
    ]
    texts = drawn_texts("fragmentation", rows, tmp_path)
    assert {"long", "short", "ours", "theirs", "failed", "25.0", "50.0", "87.5"} <= texts
    assert any("G, commit c" in text for text in texts)


def test_rates_of_the_first_set_of_tensors_are_drawn_by_whose_they_are(tmp_path: Path) -> None:
    rows = [
        {"tensors": tensors, "what": what, "GiB/s": rate, "to": to}
        for tensors, what, rate, to in (
            ("few large", "pinned out", 50.25, ""),
            ("few large", ".cpu()", 1.5, "pinned out"),
            ("few large", "out, changed", 32.125, "pinned out"),
            ("Llama", "out, changed", 99.5, "pinned out"),
            ("", "pair p50, alone", "", "alone"),
        )
    ]
    texts = drawn_texts("evict", rows, tmp_path)
    assert {"pinned copies", "torch", "contexts", "50.2", "1.5", "32.1"} <= texts
    assert not texts & {"99.5", "pair p50, alone", "torch_memory_saver"}


def drawn_texts(story: str, rows: list[dict[str, Any]], folder: Path) -> set[str]:
    machine = {"gpu": "G", "commit": "c"}
    plots.draw(Report(story, "", [], rows, machine).stored(), folder)
    picture = ElementTree.parse(folder / f"{story}.svg")
    return {element.text or "" for element in picture.iter("{http://www.w3.org/2000/svg}text")}
