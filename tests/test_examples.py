"""The examples run, and do what the README says of them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_multi_model() -> None:
    output = run("examples/multi_model.py")
    assert re.search(r"language  What is the capital of France\? -> .*Paris", output)
    heard = re.search(r"heard ([\d.]+) s to ([\d.]+) s, ([\d.]+) s to ([\d.]+) s", output)
    assert heard
    spans = [float(second) for second in heard.groups()]
    for second, expected in zip(spans, (1.0, 2.4, 3.8, 4.9), strict=True):
        assert abs(second - expected) < 0.3
    accuracies = [float(text) for text in re.findall(r"([\d.]+)% of", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 90
    used = dict(re.findall(r"^  (\w+) .*? M +([\d.]+) M", output, re.MULTILINE))
    assert float(used["language"]) > 500, "the weights are not in their context"
    assert float(used["speech"]) > 1
    assert "torch.OutOfMemoryError: DefaultCPUAllocator: can't allocate memory" in output


def test_async_models() -> None:
    output = run("examples/async_models.py")
    order = re.search(r"^order +(.*)$", output, re.MULTILINE)
    assert order
    turns = order[1].split(", ")
    assert [turn for turn in turns if turn[:3] == "llm"] == [f"llm {step}" for step in range(4)]
    assert turns.index("vision 0") < turns.index("llm 3"), "they did not take turns"
    used = [float(used) for used in re.findall(r"used +([\d.]+) MiB", output)]
    assert len(used) == 3
    assert min(used) > 0


def test_more_models_than_vram() -> None:
    output = run("examples/more_models_than_vram.py")
    needed = re.search(r"([\d.]+) times the 192 MiB of the device", output)
    assert needed
    assert float(needed[1]) > 2
    answers = re.search(r"^identical answers: (\d+) of (\d+)$", output, re.MULTILINE)
    assert answers
    assert answers[1] == answers[2]
    assert int(answers[1]) > 30
    assert "could not be served" not in output
    row = r"^(\w+) +(\w+) (?: +[\d.]+){4} +(\d+) +(\d+) +[\d.]+ +(\d+) *$"
    rows = {name: rest for name, *rest in re.findall(row, output, re.MULTILINE)}
    assert len(rows) == 9, "one table, since this is no terminal"
    tier, evictions, restores, requests = rows["assistant"]
    assert (tier, evictions, restores) == ("guaranteed", "0", "0")
    assert int(requests) > 10
    assert sum(int(restores) for _, _, restores, _ in rows.values()) > 5


def test_info() -> None:
    output = run("-m", "pygpukit_torch", "info")
    assert re.search(r"^CPU tensors +available", output, re.MULTILINE)
    assert re.search(r"^CUDA tensors +not available: .+", output, re.MULTILINE)
    assert re.search(r"^built against +torch 2\.\d+", output, re.MULTILINE)
