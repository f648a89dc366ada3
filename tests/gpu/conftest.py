"""The GPU suite: ``make gpu-test``. Without a GPU it is not collected, and never counted."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import pygpukit_torch as pgk
from benchmarks.provenance import commit, driver
from pygpukit_torch import GB, native
from pygpukit_torch.runtime import existing

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def device() -> native.CudaDevice:
    return native.CudaDevice(0, 4 << 30)


@pytest.fixture
def cuda() -> Iterator[None]:
    """A CUDA device of 16 GiB; whatever contexts a test leaves are destroyed."""
    gc.freeze()  # else each collection looks at all that earlier tests have loaded
    pgk.initialize(device="cuda", total_vram=16 * GB)
    torch.cuda.synchronize()
    yield
    gc.collect()
    torch.cuda.synchronize()
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()
    torch.cuda.empty_cache()


@pytest.fixture
def check_invariants(cuda: None) -> Iterator[None]:
    """The books are checked after the test."""
    yield
    runtime = existing()
    assert runtime is not None
    runtime.manager.check_invariants()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="write every test's name, result and duration")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--report", default=None):
        config.pluginmanager.register(Report(path))


class Report:
    """Collects the results and writes them as JSON, with what they were obtained on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"result": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed":
            test["result"] = report.outcome

    def pytest_sessionfinish(self) -> None:
        results = [test["result"] for test in self.tests.values()]
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
            "driver": driver(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "summary": {result: results.count(result) for result in sorted(set(results))},
            "tests": self.tests,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(report, indent=1) + "\n")
