"""Builds the core with the compiler's sanitizers and runs a multi-threaded stress program."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    source
    for folder in ("core", "device")
    for source in sorted((ROOT / "csrc" / folder).glob("*.cpp"))
    if not source.name.startswith("cuda_")
]


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress(sanitizer: str, tmp_path: Path) -> None:
    # One translation unit: the headers are what takes the compiler's time.
    unit = tmp_path / "all.cpp"
    everything = [*SOURCES, Path(__file__).with_name("stress.cpp")]
    unit.write_text("".join(f'#include "{source}"\n' for source in everything))
    program = tmp_path / "stress"
    flags = ["-std=c++20", "-O1", "-g1", "-pthread", f"-I{ROOT / 'csrc'}"]
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, *checks, str(unit), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.startswith("done")
