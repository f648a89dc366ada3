"""The public functions: what they accept, what they refuse, and that refusals change nothing."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    GB,
    MB,
    AdmissionError,
    ContextBusyError,
    ContextDestroyedError,
    ContextNotFoundError,
    InitializationError,
    PyGPUKitError,
    QoSPolicy,
)
from pygpukit_torch import runtime as pgk_runtime
from pygpukit_torch.free_memory import FreeMemory

pytestmark = pytest.mark.usefixtures("scheduler")


def test_a_context_shows_its_figures() -> None:
    context = pgk.create_context("a", 64 * MB, base_vram=16 * MB)
    assert (context.name, context.max_vram, context.base_vram) == ("a", 64 * MB, 16 * MB)
    assert context.qos is QoSPolicy.BURSTABLE
    assert context.partition is None
    text = "<ExecutionContext 'a' burstable idle: used 0 B, reserved 0 B, base 16.00 MiB, max 64"
    assert repr(context).startswith(text)
    context.destroy()
    assert repr(context) == "<ExecutionContext 'a' destroyed>"


def test_bases_follow_the_tier() -> None:
    guaranteed = pgk.create_context("a", 32 * MB, qos=QoSPolicy.GUARANTEED)
    assert guaranteed.base_vram == 32 * MB
    assert pgk.create_context("b", 32 * MB).base_vram == 0
    assert pgk.create_context("c", 32 * MB, qos=QoSPolicy.BEST_EFFORT).base_vram == 0
    guaranteed.resize(64 * MB)
    assert (guaranteed.max_vram, guaranteed.base_vram) == (64 * MB, 64 * MB)


def test_contexts_are_found_and_listed() -> None:
    a, b = pgk.create_context("a", 4 * MB), pgk.create_context("b", 4 * MB)
    assert pgk.get_context("a") is a
    assert pgk.list_contexts() == [a, b]
    pgk.destroy_context(a)
    pgk.destroy_context("b")
    assert pgk.list_contexts() == []


def test_a_name_is_free_again_after_destroying() -> None:
    pgk.create_context("a", 4 * MB).destroy()
    pgk.create_context("a", 8 * MB)


def test_the_available_guarantee_is_admitted_and_no_more() -> None:
    context = pgk.create_context("a", 100 * MB)
    with pgk.context_session(context):
        tensor = torch.empty(30 * MB, dtype=torch.uint8)
        torch.empty(40 * MB, dtype=torch.uint8)
    available = pgk.get_available_vram()
    assert 256 * MB - 34 * MB < available <= 226 * MB
    with pytest.raises(AdmissionError):
        pgk.create_context("b", available + 2 * MB, qos=QoSPolicy.GUARANTEED)
    pgk.create_context("b", available, qos=QoSPolicy.GUARANTEED)
    assert pgk.get_available_vram() == 0
    assert tensor.numel() == 30 * MB


def test_usage_and_memory_stats() -> None:
    context = pgk.create_context("a", 64 * MB)
    with pgk.context_session(context):
        first = torch.empty(3 * MB, dtype=torch.uint8)
        second = torch.empty(MB, dtype=torch.uint8)
    del first
    usage = pgk.get_context_usage(context)
    assert usage == pgk.ContextUsage(
        used=MB,
        reserved=4 * MB,
        max=64 * MB,
        base=0,
        peak=4 * MB,
        evicted=0,
        available=63 * MB,
        workspaces=0,
    )
    counters = context.memory_stats()
    assert counters["allocation.all.allocated"] == 2
    assert counters["allocation.all.freed"] == counters["active.all.current"] == 1
    assert counters["num_device_alloc"] * counters["page_bytes"] == usage.reserved
    context.reset_peak()
    assert context.usage().peak == MB
    assert second.numel() == MB


def test_stats_is_one_frozen_record() -> None:
    context = pgk.create_context("a", 64 * MB, qos=QoSPolicy.GUARANTEED)
    with pgk.context_session(context):
        tensor = torch.ones(1000)
        stats = pgk.stats()
    assert (stats.device, stats.device_id, stats.capacity) == ("cpu", 0, 256 * MB)
    assert stats.reserved == 2 * MB
    assert stats.pooled == 62 * MB
    assert stats.available == 192 * MB
    (only,) = stats.contexts
    assert (only.name, only.qos, only.state) == ("a", QoSPolicy.GUARANTEED, "active")
    assert only.live_blocks == 1
    assert only.usage == context.usage()
    with pytest.raises(AttributeError):
        stats.capacity = 0  # type: ignore[misc]
    assert tensor.sum() == 1000


# initialize and shutdown ---------------------------------------------------------------------


def test_initialize_again_with_the_same_or_fewer_wishes() -> None:
    pgk.initialize()
    pgk.initialize(0)
    pgk.initialize(device="cpu", total_vram=256 * MB)


def test_shutdown_needs_the_contexts_gone_and_may_be_repeated() -> None:
    context = pgk.create_context("a", 4 * MB)
    with pytest.raises(ContextBusyError, match="contexts live: 'a'"):
        pgk.shutdown()
    context.destroy()
    pgk.shutdown()
    pgk.shutdown()
    assert pgk.list_contexts() == []
    assert pgk.current_context() is None
    pgk.initialize(device="cpu", total_vram=64 * MB)
    assert pgk.stats().capacity == 64 * MB


def test_a_context_is_not_created_on_a_device_that_was_shut_down() -> None:
    """What happens when another thread shuts down while this one creates."""
    runtime = pgk_runtime.get_or_initialize()
    pgk.shutdown()
    with pytest.raises(InitializationError, match="shutdown"):
        runtime.create("late", 4 * MB, 0, QoSPolicy.BURSTABLE)
    pgk.initialize(device="cpu", total_vram=64 * MB)


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_create_context_initializes_with_a_one_line_notice() -> None:
    code = (
        "import pygpukit_torch as pgk; pgk.create_context('a', pgk.GB);"
        "s = pgk.stats(); print(s.device, s.capacity)"
    )
    result = in_fresh_process(code)
    assert result.stdout == f"cpu {8 * GB}\n"
    assert result.stderr.count("\n") == 1
    assert "using the host device (CPU tensors)" in result.stderr


def test_the_environment_sets_the_defaults_and_arguments_win() -> None:
    code = (
        "import pygpukit_torch as pgk; pgk.initialize({});"
        "s = pgk.stats(); print(s.capacity, s.host_backup)"
    )
    environment = {"PYGPUKIT_TOTAL_VRAM": str(64 * MB), "PYGPUKIT_HOST_BACKUP": "0"}
    assert in_fresh_process(code.format(""), **environment).stdout == f"{64 * MB} 0\n"
    argument = code.format("total_vram=32 * pgk.MB")
    assert in_fresh_process(argument, **environment).stdout == f"{32 * MB} 0\n"
    wrong = in_fresh_process(code.format(""), PYGPUKIT_TOTAL_VRAM="4GB")
    assert "PYGPUKIT_TOTAL_VRAM must be a whole number, got '4GB'" in wrong.stderr


def test_the_process_ends_cleanly_with_everything_open() -> None:
    code = (
        "import torch, pygpukit_torch as pgk; pgk.initialize(device='cpu');"
        "c = pgk.create_context('a', pgk.GB); s = pgk.context_session(c); s.__enter__();"
        "x = torch.ones(10); y = torch.nn.Linear(9, 9); print(x.sum().item())"
    )
    result = in_fresh_process(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "10.0\n", "")


# Wrong calls: one clear error each, and nothing has changed -----------------------------------


def _destroyed() -> pgk.ExecutionContext:
    context = pgk.create_context("gone", 4 * MB)
    context.destroy()
    return context


def _used_up(budget: int) -> None:
    pgk.get_context("a").resize(budget)


WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown context": (
        lambda: pgk.get_context("nobody"),
        ContextNotFoundError,
        "no context is named 'nobody'; there are: 'a'",
    ),
    "destroying an unknown context": (
        lambda: pgk.destroy_context("nobody"),
        ContextNotFoundError,
        "no context is named 'nobody'",
    ),
    "duplicate name": (
        lambda: pgk.create_context("a", 4 * MB),
        ValueError,
        "a context named 'a' exists already",
    ),
    "empty name": (lambda: pgk.create_context("", 4 * MB), ValueError, "needs a name"),
    "name of a wrong type": (
        lambda: pgk.create_context(7, 4 * MB),  # type: ignore[arg-type]
        TypeError,
        "name must be a str, got int 7",
    ),
    "name that is no text": (
        lambda: pgk.create_context("\ud800", 4 * MB),
        ValueError,
        "name must be printable text",
    ),
    "device number of a wrong type": (
        lambda: pgk.create_context("b", 4 * MB, device_id="0"),  # type: ignore[arg-type]
        TypeError,
        "device_id must be an int, got str '0'",
    ),
    "negative size": (lambda: pgk.create_context("b", -1), ValueError, "max_vram must be positive"),
    "zero size": (lambda: pgk.create_context("b", 0), ValueError, "max_vram must be positive"),
    "absurd size": (lambda: pgk.create_context("b", 1 << 80), ValueError, "a size that exists"),
    "size beyond the device": (
        lambda: pgk.create_context("b", 1 << 50),
        ValueError,
        "exceeds the device's capacity of 256.00 MiB",
    ),
    "size below a page": (
        lambda: pgk.create_context("b", 1000),
        ValueError,
        "less than one page of 2.00 MiB",
    ),
    "float size": (
        lambda: pgk.create_context("b", 0.5 * GB),  # type: ignore[arg-type]
        TypeError,
        r"max_vram must be a whole number of bytes \(an int, as 4 \* GB\), got float",
    ),
    "text size": (
        lambda: pgk.create_context("b", "4GB"),  # type: ignore[arg-type]
        TypeError,
        "got str '4GB'",
    ),
    "bool size": (lambda: pgk.create_context("b", True), TypeError, "got bool True"),
    "base above max": (
        lambda: pgk.create_context("b", 4 * MB, base_vram=8 * MB),
        ValueError,
        "base_vram of 8.00 MiB is above max_vram of 4.00 MiB",
    ),
    "negative base": (
        lambda: pgk.create_context("b", 4 * MB, base_vram=-1),
        ValueError,
        "base_vram must be at least 0",
    ),
    "guaranteed with another base": (
        lambda: pgk.create_context("b", 8 * MB, base_vram=4 * MB, qos=QoSPolicy.GUARANTEED),
        ValueError,
        "a guaranteed context reserves all of its max_vram",
    ),
    "best effort with a base": (
        lambda: pgk.create_context("b", 8 * MB, base_vram=4 * MB, qos=QoSPolicy.BEST_EFFORT),
        ValueError,
        "a best-effort context reserves nothing",
    ),
    "tier of a wrong type": (
        lambda: pgk.create_context("b", 8 * MB, qos="guaranteed"),  # type: ignore[arg-type]
        TypeError,
        r"qos must be a QoSPolicy, as QoSPolicy\.GUARANTEED; got str",
    ),
    "unknown partition": (
        lambda: pgk.create_context("b", 8 * MB, partition="left"),
        ValueError,
        "unknown partition 'left'",
    ),
    "unknown device": (
        lambda: pgk.create_context("b", 8 * MB, device_id=3),
        ValueError,
        "device_id 3 is not the initialized 0",
    ),
    "reservation that does not fit": (
        lambda: pgk.create_context("b", 250 * MB, qos=QoSPolicy.GUARANTEED),
        AdmissionError,
        "a reservation of 250.00 MiB does not fit: 240.00 MiB of the device's 256.00 MiB",
    ),
    "initialized otherwise": (
        lambda: pgk.initialize(total_vram=128 * MB),
        InitializationError,
        "already initialized with other arguments: asked for total_vram=134217728",
    ),
    "initialized on another device": (
        lambda: pgk.initialize(device="cuda"),
        InitializationError,
        "asked for device='cuda'",
    ),
    "device of another kind": (
        lambda: pgk.initialize(device="tpu"),
        ValueError,
        "device must be 'cuda', 'cpu' or None, got 'tpu'",
    ),
    "device id of a wrong type": (
        lambda: pgk.initialize("cuda:0"),  # type: ignore[arg-type]
        TypeError,
        "device_id must be an int, got str",
    ),
    "negative capacity": (
        lambda: pgk.initialize(total_vram=-5),
        ValueError,
        "total_vram must be positive",
    ),
    "session on something else": (
        lambda: pgk.context_session("a"),  # type: ignore[arg-type]
        TypeError,
        "expected a context from create_context, got str 'a'",
    ),
    "session on a destroyed context": (
        lambda: pgk.context_session(_destroyed()).__enter__(),
        ContextDestroyedError,
        "'gone' has been destroyed",
    ),
    "usage of a destroyed context": (
        lambda: _destroyed().usage(),
        ContextDestroyedError,
        "'gone' has been destroyed",
    ),
    "destroying twice": (
        lambda: _destroyed().destroy(),
        ContextDestroyedError,
        "'gone' has been destroyed",
    ),
    "resizing a destroyed context": (
        lambda: _destroyed().resize(8 * MB),
        ContextDestroyedError,
        "'gone' has been destroyed",
    ),
    "event of a destroyed context": (
        lambda: pgk.record_event(_destroyed()),
        ContextDestroyedError,
        "'gone' has been destroyed",
    ),
    "waiting for something else": (
        lambda: pgk.wait_event(pgk.get_context("a"), "event"),  # type: ignore[arg-type]
        TypeError,
        "expected an event from record_event, got str",
    ),
    "resizing below what is used": (
        lambda: _used_up(2 * MB),
        ValueError,
        "'a' cannot be resized to 2.00 MiB: its live tensors use 3.00 MiB in pages of 4.00 MiB",
    ),
    "resizing to a wrong type": (
        lambda: _used_up("big"),  # type: ignore[arg-type]
        TypeError,
        "max_vram must be a whole number",
    ),
    "shutting down with contexts": (pgk.shutdown, ContextBusyError, "contexts live: 'a'"),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    context = pgk.create_context("a", 16 * MB, base_vram=16 * MB)
    with pgk.context_session(context):
        tensor = torch.ones(3 * MB, dtype=torch.uint8)
    before = pgk.stats()
    with pytest.raises(error, match=text) as caught:
        call()
    assert isinstance(caught.value, (PyGPUKitError, ValueError, TypeError))
    assert "\n" not in str(caught.value)
    assert pgk.stats() == before
    assert pgk.list_contexts() == [context]
    assert pgk.current_context() is None
    assert (context.max_vram, context.base_vram) == (16 * MB, 16 * MB)
    assert tensor.sum() == 3 * MB


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"device": "cuda"}, InitializationError, "device 'cuda' cannot be used: t"),
        ({"device": "cpu", "device_id": 1}, ValueError, "device_id 1 does not exist"),
        ({"device": "cpu", "total_vram": 1000}, ValueError, "not between one page"),
        ({"device": "cpu", "total_vram": 1 << 60}, ValueError, "not between one page"),
        ({"device_id": -1}, ValueError, "must not be negative"),
        ({"host_backup": -1}, ValueError, "host_backup must be at least 0"),
    ],
)
def test_wrong_first_initializations(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    pgk.shutdown()
    with pytest.raises(error, match=text):
        pgk.initialize(**arguments)
    pgk.initialize(device="cpu", total_vram=32 * MB)
    assert pgk.stats().capacity == 32 * MB


def test_get_context_before_anything_exists() -> None:
    pgk.shutdown()
    with pytest.raises(ContextNotFoundError, match="there are: none"):
        pgk.get_context("a")
    with pytest.raises(KeyError):
        pgk.get_context("a")


def test_free_memory_of_a_session_is_its_contexts() -> None:
    """What ``torch.cuda.mem_get_info`` answers; that it asks is shown on a GPU."""
    free = FreeMemory(pgk_runtime.existing().manager, 0)  # type: ignore[union-attr]
    asked = free.wrapped(lambda device=None: (1, 2))
    context = pgk.create_context("a", 64 * MB)
    assert asked() == asked(0) == (1, 2)
    with pgk.context_session(context):
        assert asked(0) == asked("cuda:0") == asked(torch.device("cuda", 0)) == (64 * MB, 64 * MB)
        kept = torch.ones(4 * MB, dtype=torch.uint8)
        assert asked(0) == (60 * MB, 64 * MB)
        assert asked(1) == asked(device="cuda:1") == (1, 2)
        with pgk.context_session(pgk.create_context("b", 8 * MB)):
            assert asked(0) == (8 * MB, 8 * MB)
    assert kept.numel() == 4 * MB


def test_the_free_memory_of_sessions_is_a_matter_of_choice() -> None:
    with pytest.raises(InitializationError, match="session_mem_info"):
        pgk.initialize(device="cpu", session_mem_info=False)
    with pytest.raises(TypeError, match="session_mem_info must be a bool"):
        pgk.initialize(device="cpu", session_mem_info=1)  # type: ignore[arg-type]


def test_figures_have_torchs_keys_and_their_parts_add_up() -> None:
    context = pgk.create_context("a", 64 * MB)
    with pgk.context_session(context):
        small = [torch.empty(MB, dtype=torch.uint8) for _ in range(3)]
        large = torch.empty(MB + 512, dtype=torch.uint8)
        del small[1:]
    stats = context.memory_stats()
    assert stats["allocated_bytes.small_pool.current"] == MB
    assert stats["allocated_bytes.small_pool.peak"] == 3 * MB
    assert stats["allocated_bytes.large_pool.current"] == MB + 512
    assert stats["allocation.small_pool.allocated"] == 3
    assert stats["allocation.small_pool.freed"] == 2
    assert stats["reserved_bytes.all.peak"] == stats["reserved_bytes.all.current"] >= 4 * MB
    for name in stats:
        if ".all." in name and not name.endswith("peak"):
            parts = (name.replace(".all.", pool) for pool in (".small_pool.", ".large_pool."))
            assert stats[name] == sum(stats[part] for part in parts), name
    context.reset_peak()
    del large
    stats = context.memory_stats()
    assert stats["allocated_bytes.small_pool.peak"] == MB
    assert stats["allocated_bytes.large_pool.peak"] == MB + 512
    assert stats["allocated_bytes.large_pool.current"] == 0


def test_no_difference_of_figures_is_negative_while_pages_move() -> None:
    context = pgk.create_context("a", 64 * MB)
    with pgk.context_session(context):
        kept = torch.ones(32 * MB, dtype=torch.uint8)
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            context.evict()
            context.restore()

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(300):
            stats = context.memory_stats()
            reserved = stats["reserved_bytes.all.current"]
            assert 0 <= stats["allocated_bytes.all.current"] <= reserved
            assert stats["active_bytes.all.current"] <= reserved
            assert min(stats[name] for name in stats if name != "max_split_size") >= 0
    finally:
        stop.set()
        mover.join()
    context.evict()
    stats = context.memory_stats()
    assert stats["allocated_bytes.all.current"] == stats["reserved_bytes.all.current"] == 0
    assert stats["reserved_bytes.all.freed"] == 0, "nothing was given back"
    context.reset_peak()
    stats = context.memory_stats()
    assert stats["allocated_bytes.all.peak"] == stats["reserved_bytes.all.peak"] == 0
    assert stats["evicted_bytes.current"] == context.usage().used == 32 * MB
    assert kept[-1] == 1


def test_the_summary_of_a_context_is_torchs_table() -> None:
    context = pgk.create_context("a", 64 * MB)
    with pgk.context_session(context):
        kept = torch.ones(20 * MB, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(60 * MB, dtype=torch.uint8)
    text = context.memory_summary()
    first, *lines = text.splitlines()
    assert first == "Context 'a'"
    assert "PyTorch CUDA memory summary, device ID 0" in lines[1]
    assert re.search(r"\| Allocated memory +\|  20480 KiB \|", text)
    assert "CUDA OOMs: 1 " in text
    assert "from small pool" in text
    assert "from small pool" not in context.memory_summary(abbreviated=True)
    assert kept[-1] == 1
