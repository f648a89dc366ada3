"""The layers of csrc/, as far as their includes tell: who may know of whom."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# Folders each folder may include from, and what else than the C++ standard library it may use.
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "core": ({"core", "device"}, set()),
    "device": ({"core", "device"}, {"fcntl.h", "unistd.h", "sys/", "cuda.h", "dlfcn.h"}),
    "torch": (
        {"core", "device", "torch"},
        {"ATen/", "c10/", "torch/", "cuda_runtime_api.h", "pthread.h", "sys/"},
    ),
    "python": (
        {"core", "device", "torch", "python"},
        # Torch's header converts tensors and dtypes.
        {"pybind11/", "sys/", "unistd.h", "torch/csrc/utils/pybind.h"},
    ),
}
# Below the interface, only the core's vocabulary may be known; above it, only the interface.
DEVICE_SEES_OF_CORE = {"core/types.h", "core/error.h"}
CORE_SEES_OF_DEVICE = {"device/device.h"}

FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp"})


def includes(path: Path) -> list[tuple[str, str]]:
    return re.findall(r'^#include ([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_stay_in_their_layer(path: Path) -> None:
    layer = path.relative_to(CSRC).parts[0]
    folders, libraries = LAYERS[layer]
    for kind, name in includes(path):
        folder = name.split("/")[0]
        if kind == '"':
            assert folder in folders, f"{layer} must not know {name}"
            if layer == "device" and folder == "core":
                assert name in DEVICE_SEES_OF_CORE
            if layer == "core" and folder == "device":
                assert name in CORE_SEES_OF_DEVICE
        else:
            standard = "/" not in name and not name.endswith(".h")
            allowed = any(
                name.startswith(library) if library.endswith("/") else name == library
                for library in libraries
            )
            assert standard or allowed, f"{layer} must not use <{name}>"


def test_there_are_files_in_every_layer() -> None:
    assert {path.relative_to(CSRC).parts[0] for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
