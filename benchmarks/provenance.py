"""What a result was obtained with: the state of the repository, the driver, other packages."""

import os
import subprocess
from importlib.metadata import packages_distributions, version

# What stories run or compare with.
PACKAGES = ("transformers", "accelerate", "rmm", "torch_memory_saver")


def commit() -> str:
    """The commit, marked if there were changes on top, or what ``PYGPUKIT_COMMIT`` says it is."""
    if told := os.environ.get("PYGPUKIT_COMMIT"):
        return told
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return described or "unknown"


def driver() -> str:
    """Return the version of the GPU's driver, as nvidia-smi tells it."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def versions() -> dict[str, str]:
    """Return those of ``PACKAGES`` that are installed, by the names that are imported."""
    distributions = packages_distributions()
    return {name: version(distributions[name][0]) for name in PACKAGES if name in distributions}
