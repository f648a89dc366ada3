"""Fixtures and settings that all tests share."""

from collections.abc import Iterator

import hypothesis
import pytest

import pygpukit_torch as pgk
from pygpukit_torch import MB

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
