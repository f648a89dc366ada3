"""Two contexts on the host device, for tests that need no more of them than that they differ."""

import pytest

import pygpukit_torch as pgk
from pygpukit_torch import MB


@pytest.fixture
def a(scheduler: None) -> pgk.ExecutionContext:
    return pgk.create_context("a", 32 * MB)


@pytest.fixture
def b(scheduler: None) -> pgk.ExecutionContext:
    return pgk.create_context("b", 32 * MB)
