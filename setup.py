"""Builds the native module against the torch that is installed.

With a CUDA torch the CUDA device is built in. That takes the driver's header and nothing else: it
comes with the CUDA runtime that torch depends on, or with a toolkit.
"""

import os
import sys
from glob import glob
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

PACKAGE = "pygpukit_torch"


class Build(BuildExtension):
    def run(self) -> None:
        super().run()
        # Torch's C++ interface changes between minor versions; the package reads this before it
        # loads the module (see pygpukit_torch/_build_check.py).
        module = Path(self.get_ext_fullpath(f"{PACKAGE}.native"))
        (module.parent / "_build.py").write_text(
            f"TORCH_VERSION = {str(torch.__version__)!r}\nSOURCES = {str(Path.cwd())!r}\n"
        )


def cuda_headers() -> str:
    """Find the folder of cuda.h."""
    try:
        wheel = files("nvidia-cuda-runtime") or []
    except PackageNotFoundError:
        wheel = []
    headers = [str(file.locate()) for file in wheel if file.name == "cuda.h"]
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for header in [*headers, f"{toolkit}/include/cuda.h"]:
        if os.path.exists(header):
            return os.path.dirname(header)
    sys.exit(
        f"torch {torch.__version__} is a CUDA build, but cuda.h was not found: "
        "pip install nvidia-cuda-runtime, or set CUDA_HOME to a toolkit"
    )


sources = sorted(glob("csrc/*/*.cpp"))
system_headers = include_paths()
flags = ["-std=c++20", "-O3", "-g1"]
if torch.version.cuda:
    system_headers.append(cuda_headers())
    flags.append("-DPGK_WITH_CUDA")
else:
    sources = [source for source in sources if not Path(source).name.startswith("cuda_")]
if os.environ.get("PYGPUKIT_STRICT"):
    flags += ["-Wall", "-Wextra", "-Werror"]
flags += [flag for path in system_headers for flag in ("-isystem", path)]

setup(
    ext_modules=[
        CppExtension(
            f"{PACKAGE}.native",
            sources,
            include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
            extra_compile_args=flags,
        )
    ],
    cmdclass={"build_ext": Build},
)
