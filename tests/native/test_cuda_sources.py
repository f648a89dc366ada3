"""The CUDA sources compile everywhere, also where there is neither a GPU nor a CUDA torch."""

import subprocess
import sysconfig
from importlib.metadata import files
from pathlib import Path

import pybind11
import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(CSRC.rglob("cuda_*.cpp"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source: Path) -> None:
    (header,) = [file for file in files("nvidia-cuda-runtime") or [] if file.name == "cuda.h"]
    system = [
        str(Path(str(header.locate())).parent),
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    includes = [flag for path in system for flag in ("-isystem", path)]
    subprocess.run(["g++", *flags, *includes, str(source)], check=True)


def test_there_are_cuda_sources() -> None:
    assert SOURCES
