"""Refuses to load a native module that was built against another torch.

Torch's C++ interface differs between minor versions; a module built against another one would
crash or, worse, not crash. This runs before the module is touched.
"""

import torch

MEND = "pip install --no-build-isolation --force-reinstall --no-deps <the pygpukit_torch sources>"


def minor_version(version: str) -> str:
    """``"2.13"`` of ``"2.13.0+cpu"``."""
    return ".".join(version.split(".")[:2])


def check(built_against: str, running: str) -> None:
    """Raise ImportError if the two versions of torch differ in their minor version."""
    if minor_version(running) != minor_version(built_against):
        raise ImportError(
            f"pygpukit_torch was built against torch {built_against}, but torch {running} is "
            f"installed. Build it again: {MEND}"
        )


def check_this_build() -> None:
    """Check the module of this installation. Raises ImportError."""
    try:
        from pygpukit_torch._build import TORCH_VERSION
    except ModuleNotFoundError:
        raise ImportError(f"pygpukit_torch has not been built. Build it: {MEND}") from None
    check(TORCH_VERSION, torch.__version__)
