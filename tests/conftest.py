"""Fixtures and settings that all tests share."""

from collections.abc import Iterator

import hypothesis
import pytest

import pygpukit_torch as pgk
from pygpukit_torch import MB
from tests.quick_benchmarks import QuickBenchmarks, run_all

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")


@pytest.fixture
def scheduler() -> Iterator[None]:
    """A host device of 256 MiB; whatever contexts a test leaves are destroyed."""
    pgk.initialize(device="cpu", total_vram=256 * MB)
    yield
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()


@pytest.fixture(scope="session")
def quick_benchmarks(tmp_path_factory: pytest.TempPathFactory) -> QuickBenchmarks:
    """All benchmarks, quickly, on this machine: one run for all tests."""
    return run_all(tmp_path_factory.mktemp("benchmarks"))
