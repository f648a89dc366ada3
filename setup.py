"""Builds the native module against the torch that is installed."""

import os
from glob import glob
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


system_headers = [flag for path in include_paths() for flag in ("-isystem", path)]
strict = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("PYGPUKIT_STRICT") else []

setup(
    ext_modules=[
        CppExtension(
            f"{PACKAGE}.native",
            sorted(glob("csrc/*/*.cpp")),
            include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
            extra_compile_args=["-std=c++20", "-O3", "-g1", *system_headers, *strict],
        )
    ],
    cmdclass={"build_ext": Build},
)
