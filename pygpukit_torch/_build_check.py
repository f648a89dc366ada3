"""Refuses to load a native module that was built against another torch.

Torch's C++ interface differs between minor versions; a module built against another one would
crash or, worse, not crash. This runs before the module is touched.
"""

from pathlib import Path

import torch

UNKNOWN = "PATH_TO_THE_SOURCES_OF_pygpukit_torch"


def mend(sources: str) -> str:
    """Return the command that builds the module again, from ``sources`` if they are still there."""
    place = sources if (Path(sources) / "setup.py").exists() else UNKNOWN
    return f"pip install --no-build-isolation --no-deps --force-reinstall {place}"


def minor_version(version: str) -> str:
    """``"2.13"`` of ``"2.13.0+cpu"``."""
    return ".".join(version.split(".")[:2])


def check(built_against: str, running: str, sources: str) -> None:
    """Raise ImportError if the two versions of torch differ in their minor version."""
    if minor_version(running) != minor_version(built_against):
        raise ImportError(
            f"pygpukit_torch was built against torch {built_against}, but torch {running} is "
            f"installed. Build it again: {mend(sources)}"
        )


def check_this_build() -> None:
    """Check the module of this installation. Raises ImportError."""
    try:
        from pygpukit_torch._build import SOURCES, TORCH_VERSION
    except ModuleNotFoundError:
        here = str(Path(__file__).parents[1])
        raise ImportError(
            f"pygpukit_torch has not been built in {here}, from where Python imports it. If it is "
            f"installed, start Python in another folder; else build it: {mend(here)}"
        ) from None
    check(TORCH_VERSION, torch.__version__, SOURCES)
