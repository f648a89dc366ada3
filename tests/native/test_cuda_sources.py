"""The CUDA sources compile against the oldest and the newest torch, also where there is no GPU."""

import subprocess
import sysconfig
from importlib.metadata import files
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.rglob("cuda_*.cpp"))
# Unpacked by scripts/torch_headers.py; see the Makefile.
HEADERS = sorted((ROOT / ".venv/torch-headers").glob("*"))


@pytest.mark.parametrize("headers", HEADERS, ids=lambda path: path.name)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source: Path, headers: Path) -> None:
    (header,) = [file for file in files("nvidia-cuda-runtime") or [] if file.name == "cuda.h"]
    system = [
        str(headers),
        str(headers / "torch/csrc/api/include"),
        str(Path(str(header.locate())).parent),
        sysconfig.get_paths()["include"],
    ]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    includes = [flag for path in system for flag in ("-isystem", path)]
    subprocess.run(["g++", *flags, *includes, str(source)], check=True)


def test_nothing_is_left_out() -> None:
    assert len(SOURCES) >= 8
    versions = [tuple(map(int, path.name.split("."))) for path in HEADERS]
    ours = tuple(map(int, torch.__version__.split("+")[0].split(".")))
    assert len(versions) >= 2
    assert min(versions) < ours < max(versions) or ours in versions
