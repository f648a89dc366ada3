"""Builds the native module against the torch that is installed.

With a CUDA torch the CUDA device is built in. That takes the CUDA runtime's headers and nothing
else: they come with a toolkit, or as wheels: nvidia-cuda-runtime, which torch depends on, and
nvidia-cuda-crt, which it does not.
"""

import os
import sys
from glob import glob
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

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
    """Find the folder of the CUDA runtime's headers: in torch's wheels, or in a toolkit."""
    folders = []
    for wheel in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            headers = [file for file in files(wheel) or [] if file.name == "cuda.h"]
        except PackageNotFoundError:
            continue
        folders += [os.path.dirname(str(header.locate())) for header in headers]
    folders.append(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include"))
    for folder in folders:
        if all(os.path.exists(f"{folder}/{name}") for name in ("cuda.h", "crt/host_defines.h")):
            return folder
    sys.exit(
        f"torch {torch.__version__} is a CUDA build, but the CUDA runtime's headers were not found "
        f"in any of {', '.join(folders)}: pip install nvidia-cuda-runtime nvidia-cuda-crt, or set "
        "CUDA_HOME to a toolkit"
    )


sources = sorted(glob("csrc/*/*.cpp"))
system_headers = include_paths()
flags = ["-std=c++20", "-O3", "-g1", "-fvisibility=hidden"]
libraries = []
if torch.version.cuda:
    system_headers.append(cuda_headers())
    flags.append("-DPGK_WITH_CUDA")
    libraries += ["c10_cuda", "torch_cuda"]
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
            include_dirs=[os.path.abspath("csrc")],
            libraries=libraries,
            extra_compile_args=flags,
        )
    ],
    cmdclass={"build_ext": Build},
)
