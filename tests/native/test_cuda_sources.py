"""The CUDA sources compile against the oldest and the newest torch, also where there is no GPU."""

import re
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


def cuda_headers() -> Path:
    (header,) = [file for file in files("nvidia-cuda-runtime") or [] if file.name == "cuda.h"]
    return Path(str(header.locate())).parent


@pytest.mark.parametrize("headers", HEADERS, ids=lambda path: path.name)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source: Path, headers: Path) -> None:
    system = [
        str(headers),
        str(headers / "torch/csrc/api/include"),
        str(cuda_headers()),
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


def test_the_driver_is_asked_for_the_functions_that_the_headers_declare(tmp_path: Path) -> None:
    """A name can have another signature in a newer driver API, which cuGetProcAddress returns."""
    loader = (CSRC / "device/cuda_driver.cpp").read_text()
    (version,) = re.findall(r"kApiVersion = (\d+);", loader)
    header = (CSRC / "device/cuda_driver.h").read_text()
    names = dict.fromkeys(re.findall(r"X\((cu\w+)\)", header), version)
    later = dict(re.findall(r"X\((cu\w+), (\d+)\)", header))
    typedefs = (cuda_headers() / "cudaTypedefs.h").read_text()
    checks = []
    for name, asked in (names | later).items():
        known = {int(number) for number in re.findall(rf"PFN_{name}_v(\d+)\)", typedefs)}
        returned = max(number for number in known if number <= int(asked))
        checks.append(
            f"static_assert(std::is_same_v<decltype(&::{name}), PFN_{name}_v{returned}>);"
        )
    assert len(checks) > 25
    assert len(later) >= 5
    unit = tmp_path / "signatures.cpp"
    unit.write_text("#include <cudaTypedefs.h>\n#include <type_traits>\n" + "\n".join(checks))
    flags = ["-std=c++20", "-fsyntax-only", "-isystem", str(cuda_headers())]
    subprocess.run(["g++", *flags, str(unit)], check=True)
