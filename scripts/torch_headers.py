"""Unpacks the C++ headers of a torch, to compile against it without installing it.

Usage: ``python scripts/torch_headers.py FOLDER VERSION...``; each goes to ``FOLDER/VERSION``. The
wheels are what pip finds for this interpreter; one of them is downloaded at a time.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What the build of a CUDA torch generates and that of a CPU torch does not.
GENERATED = "c10/cuda/impl/cuda_cmake_macros.h"
MACROS = "#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n"


def unpack(version: str, folder: Path) -> None:
    """Fill ``folder`` with the headers; it only appears once it is complete."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary=:all:", "--dest", scratch, f"torch=={version}"),
            ],
            check=True,
        )
        (wheel,) = Path(scratch).glob("torch-*.whl")
        partial = Path(scratch) / "headers"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(partial, names)
        generated = partial / "torch/include" / GENERATED
        if not generated.exists():
            generated.write_text(MACROS)
        (partial / "torch/include").rename(folder)


def main() -> None:
    """Unpack what is not there yet."""
    root, *versions = sys.argv[1:]
    Path(root).mkdir(parents=True, exist_ok=True)
    for version in versions:
        folder = Path(root) / version
        if not folder.exists():
            print(f"headers of torch {version} ...", flush=True)
            unpack(version, folder)


if __name__ == "__main__":
    main()
