"""Contexts that give way, under torch: models of several GiB, work on the default stream, graphs,
claims, and everything else that a process does meanwhile."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, ContextBusyError, QoSPolicy, context_session, create_context
from tests.gpu.beside import beside
from tests.gpu.models import llama, tokens
from tests.gpu.test_graphs import captured, replayed, work

pytestmark = pytest.mark.usefixtures("check_invariants")


@pytest.fixture
def cuda() -> Iterator[None]:
    """A CUDA device of 6 GiB with host memory for 24; claims wait up to 2 seconds."""
    pgk.initialize(device="cuda", total_vram=6 * GB, host_backup=24 * GB, claim_timeout=2)
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()
    torch.cuda.empty_cache()


def free_vram() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def test_evicted_memory_is_given_up_and_its_addresses_stay_valid() -> None:
    context = create_context("a", 5 * GB)
    with context_session(context):
        x = torch.arange(GB // 4, device="cuda", dtype=torch.int32)
        small = torch.ones(1000, device="cuda")
    total, before, address = x.sum(dtype=torch.int64).item(), free_vram(), x.data_ptr()
    context.evict()
    torch.cuda.empty_cache()
    # The buffers that copies go through stay.
    assert free_vram() - before >= GB - 64 * MB
    usage = context.usage()
    assert usage.reserved == 0
    assert GB <= usage.evicted <= GB + 128 * MB
    # Kernels read and write it, on the default stream and on the context's; copies both ways.
    assert x.sum(dtype=torch.int64).item() == total
    assert x[-3:].cpu().tolist() == [GB // 4 - 3, GB // 4 - 2, GB // 4 - 1]
    small.mul_(3)
    small[:3].copy_(torch.tensor([7.0, 8.0, 9.0]))
    pinned = torch.tensor([5.0, 6.0]).pin_memory()
    small[3:5].copy_(pinned, non_blocking=True)
    assert small[:6].tolist() == [7, 8, 9, 5, 6, 3]
    with context_session(context):
        assert context.usage().evicted == 0
        assert x.data_ptr() == address
        assert x.sum(dtype=torch.int64).item() == total
        assert small[:6].tolist() == [7, 8, 9, 5, 6, 3]


def test_one_changed_byte_is_one_page_copied() -> None:
    context = create_context("a", 3 * GB)
    with context_session(context):
        x = torch.zeros(2 * GB, dtype=torch.uint8, device="cuda")
    context.evict()
    context.restore()
    before = pgk.stats().contexts[0]
    x[GB + 12345] = 1
    context.evict()
    after = pgk.stats().contexts[0]
    page = context.memory_stats()["page_bytes"]
    assert after.bytes_out - before.bytes_out == page
    assert after.pages_unchanged - before.pages_unchanged == 2 * GB // page - 1
    context.restore()
    assert x.sum(dtype=torch.int64).item() == 1
    assert x[GB + 12345].item() == 1


def test_models_that_do_not_fit_together_take_turns() -> None:
    """Six of a third of the device each: outputs are those of the first turn, whoever went out."""
    pgk.shutdown()
    pgk.initialize(device="cuda", total_vram=12 * GB, host_backup=32 * GB)
    models = []
    torch.set_default_dtype(torch.bfloat16)
    for seed in range(6):
        context = create_context(f"m{seed}", 5 * GB, qos=QoSPolicy.BEST_EFFORT)
        with context_session(context), torch.device("cuda"):
            model = llama(layers=34, hidden=2048, vocabulary=8000)
            for parameter in model.parameters():
                parameter.data.mul_(1 + seed / 10)
        models.append((context, model))
    torch.set_default_dtype(torch.float32)
    sizes = [context.usage().used for context, _ in models]
    assert sum(sizes) > 18 * GB
    ids = tokens(2, 16, 8000)

    def answer(turn: int) -> list[list[int]]:
        context, model = models[turn]
        with context_session(context):
            assert context.usage().evicted == 0
            result: list[list[int]] = model.generate(
                ids, max_new_tokens=4, do_sample=False, eos_token_id=None
            ).tolist()
        return result

    expected = [answer(turn) for turn in range(6)]
    choice = random.Random(3)
    for turn in (choice.randrange(6) for _ in range(60)):
        assert answer(turn) == expected[turn]
    stats = pgk.stats()
    assert stats.reserved <= 12 * GB
    assert sum(context.restores for context in stats.contexts) >= 20
    print(
        f"\n60 turns of 6 models of {sizes[0] / GB:.2f} GiB:",
        ", ".join(
            f"{c.name} {c.restores} restores, {c.pages_unchanged} pages unchanged"
            for c in stats.contexts
        ),
    )
    models.clear()


def test_a_thousand_moves_each_way_under_load() -> None:
    """The move, with everything at once that could get in its way."""
    target = create_context("target", 2 * GB)
    consumer = create_context("consumer", GB)
    other = create_context("other", GB, qos=QoSPolicy.GUARANTEED)
    with context_session(target):
        read = torch.randint(0, 1 << 30, (GB // 8,), dtype=torch.int32, device="cuda")
        written = torch.zeros(GB // 8, dtype=torch.int32, device="cuda")
    expected = read.sum(dtype=torch.int64).item()
    with context_session(other):
        a = torch.randn(1024, 1024, device="cuda")
        product = (a @ a).sum().item()
    alone: list[float] = []
    latencies: list[float] = []
    into = alone
    updates = 0
    graph_source = torch.ones(1000, device="cuda")
    # Captures and cudaFree exclude each other in torch, whatever we do.
    capturing = threading.Lock()

    def reader() -> None:
        start = time.perf_counter()
        assert read.sum(dtype=torch.int64).item() == expected
        into.append(time.perf_counter() - start)

    def writer() -> None:
        nonlocal updates
        written.add_(1)
        updates += 1
        torch.cuda.default_stream().synchronize()

    def consume() -> None:
        with context_session(target):
            event = pgk.record_event(target)
        with context_session(consumer, wait=False):
            pgk.wait_event(consumer, event)
            total = read[: 64 * MB].sum(dtype=torch.int64)
            torch.cuda.current_stream().synchronize()
            assert total.item() == read[: 64 * MB].sum(dtype=torch.int64).item()
        time.sleep(0.02)

    def session_of_another() -> None:
        with context_session(other):
            assert (a @ a).sum().item() == product

    numbers = itertools.count()

    def cold_kernel() -> None:
        k = next(numbers)
        function = torch.cuda.jiterator._create_jit_fn(
            f"template <typename T> T f{k}(T x) {{ return x * {k % 7}; }}"
        )
        assert function(graph_source)[0].item() == k % 7
        time.sleep(0.05)

    def empty_cache() -> None:
        torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
        with capturing:
            torch.cuda.empty_cache()
        time.sleep(0.01)

    def out_of_memory() -> None:
        with pytest.raises(torch.OutOfMemoryError), capturing:
            torch.empty(200 * GB, dtype=torch.uint8, device="cuda")
        time.sleep(0.05)

    def capture() -> None:
        with capturing:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                y = graph_source * 2
        graph.replay()
        torch.cuda.current_stream().synchronize()
        assert y[0].item() == 2
        time.sleep(0.01)

    def pinned() -> None:
        source = torch.full((4 * MB,), 3.0, pin_memory=True)
        assert source.to("cuda", non_blocking=True).sum().item() == 3.0 * 4 * MB
        time.sleep(0.005)

    noise: list[Callable[[], None]] = [
        reader, writer, consume, session_of_another, cold_kernel, empty_cache, out_of_memory,
        capture, pinned,
    ]  # fmt: skip
    durations: list[float] = []
    refused = 0
    with ExitStack() as stack:
        for one in noise:
            stack.enter_context(beside(one))
        time.sleep(3)
        into = latencies
        deadline = time.monotonic() + 60
        page = target.memory_stats()["page_bytes"]
        while time.monotonic() < deadline:
            stats = {context.name: context for context in pgk.stats().contexts}["target"]
            if min(stats.bytes_out // page + stats.pages_unchanged, stats.bytes_in // page) >= 1000:
                break
            start = time.perf_counter()
            try:
                target.evict()
                target.restore()
            except ContextBusyError:
                refused += 1
                time.sleep(0.001)
                continue
            durations.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    stats = {context.name: context for context in pgk.stats().contexts}["target"]
    out, in_ = stats.bytes_out // page + stats.pages_unchanged, stats.bytes_in // page
    print(
        f"\n{out} pages out ({stats.bytes_out // page} copied), {in_} in, {len(durations)} times "
        f"there and back, {refused} refused as in use, {updates} updates, {len(latencies)} reads"
        f"\n  a read: alone p50 {1e3 * statistics.median(alone):.2f} p99 "
        f"{1e3 * percentile(alone, 0.99):.2f} ms; beside moves p50 "
        f"{1e3 * statistics.median(latencies):.2f} p99 {1e3 * percentile(latencies, 0.99):.2f} ms"
    )
    assert min(out, in_) >= 1000
    assert written.eq(updates).all()
    assert read.sum(dtype=torch.int64).item() == expected
    target.evict()
    assert written.eq(updates).all()
    assert read.sum(dtype=torch.int64).item() == expected


def test_a_hundred_evictions_under_running_work_of_others() -> None:
    a, b = (create_context(name, 4 * GB, qos=QoSPolicy.BEST_EFFORT) for name in "ab")
    other = create_context("other", GB, qos=QoSPolicy.GUARANTEED)
    data = {}
    for mark, context in enumerate((a, b), start=1):
        with context_session(context):
            data[context] = torch.full((7 * GB // 8,), mark, dtype=torch.int32, device="cuda")
    with context_session(other):
        x = torch.randn(1024, 1024, device="cuda")
        expected = torch.relu(x @ x).sum().item()

    def running() -> None:
        with context_session(other):
            y = torch.relu(x @ x)
            assert y.sum().item() == expected

    wrong = 0
    with beside(running), beside(running):
        for turn in range(100):
            context = (a, b)[turn % 2]
            mark = 1 + turn % 2
            with context_session(context):
                wrong += not data[context].min() == data[context].max() == mark
    assert wrong == 0
    evictions = {context.name: context.evictions for context in pgk.stats().contexts}
    assert evictions["a"] + evictions["b"] >= 99
    assert evictions["other"] == 0


def test_a_captured_graph_replays_evicted_and_restored() -> None:
    context = create_context("a", GB)
    graph, x, y = captured(context, 1)
    expected = work(x).clone()
    context.evict()
    assert context.usage().reserved == 0
    graph.replay()  # on the default stream
    torch.cuda.synchronize()
    torch.testing.assert_close(y, expected)
    x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, work(x))
    expected = work(x * 0.5)
    torch.testing.assert_close(replayed(context, (graph, x, y)), expected)
    assert context.usage().evicted == 0
    context.evict()
    context.restore()
    torch.testing.assert_close(replayed(context, (graph, x, y)), work(x))
    del graph, x, y


def test_a_base_is_claimed_from_a_context_at_work() -> None:
    """Its stream is stopped between two kernels, its pages move, and it goes on."""
    reserved = create_context("reserved", 4 * GB, qos=QoSPolicy.GUARANTEED)
    low = create_context("low", 6 * GB, qos=QoSPolicy.BEST_EFFORT)
    with context_session(low):
        x = torch.zeros(5 * GB // 4, dtype=torch.int32, device="cuda")
    started, stop = threading.Event(), threading.Event()
    updates = 0

    def at_work() -> None:
        nonlocal updates
        with context_session(low):
            while not stop.is_set():
                x.add_(1)
                updates += 1
                if updates % 20 == 0:
                    torch.cuda.current_stream().synchronize()
                started.set()

    thread = threading.Thread(target=at_work, daemon=True)
    thread.start()
    started.wait(30)
    try:
        start = time.perf_counter()
        with context_session(reserved):
            y = torch.full((7 * GB // 8,), 5, dtype=torch.int32, device="cuda")
            torch.cuda.current_stream().synchronize()
        claimed = time.perf_counter() - start
        assert low.state == "active"
        evicted = low.usage().evicted
    finally:
        stop.set()
        thread.join()
    print(
        f"\nclaimed 3.5 GiB of a context at work in {1e3 * claimed:.0f} ms, {evicted / GB:.2f} GiB"
    )
    assert evicted >= 2 * GB
    assert y.min() == y.max() == 5
    assert x.min() == x.max() == updates
    del y
    reserved.destroy()
    with context_session(low):
        assert low.usage().evicted == 0
        assert x.min() == x.max() == updates


def test_memory_outside_of_contexts_gets_what_best_effort_holds() -> None:
    pgk.shutdown()
    pgk.initialize(device="cuda", host_backup=96 * GB)
    low = create_context("low", free_vram() - 4 * GB, qos=QoSPolicy.BEST_EFFORT)
    with context_session(low):
        x = torch.full((low.usage().available // GB * GB,), 7, dtype=torch.uint8, device="cuda")
    outside = torch.ones(free_vram() + 2 * GB, dtype=torch.uint8, device="cuda")
    assert low.usage().evicted >= 2 * GB
    assert outside.min().item() == 1
    del outside
    torch.cuda.empty_cache()
    assert x.min() == x.max() == 7
    with context_session(low):
        assert low.usage().evicted == 0
        assert x.min() == x.max() == 7
    del x


def test_reservations_are_safe_from_memory_outside_of_contexts() -> None:
    pgk.shutdown()
    pgk.initialize(device="cuda", host_backup=24 * GB)
    reserved = create_context("reserved", 16 * GB, qos=QoSPolicy.GUARANTEED)
    taken = []

    def take_all() -> None:
        while True:
            taken.append(torch.empty(2 * GB, dtype=torch.uint8, device="cuda"))

    with pytest.raises(torch.OutOfMemoryError):
        take_all()
    with context_session(reserved):
        x = torch.ones(15 * GB, dtype=torch.uint8, device="cuda")
    assert x[-1].item() == 1
    del x


def test_backward_in_torchs_worker_of_a_context_that_gave_way_in_between() -> None:
    a, b = (create_context(name, 6 * GB) for name in "ab")
    with context_session(a):
        weight = torch.full((GB // 4,), 2.0, device="cuda", requires_grad=True)
        loss = weight.square().sum()
    with context_session(b):
        filler = torch.zeros(11 * GB // 2, dtype=torch.uint8, device="cuda")
    assert a.usage().evicted > 0
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.min() == weight.grad.max() == 4
    assert filler.max().item() == 0
    del weight, loss, filler


def test_who_enters_while_memory_comes_back_waits(cuda: None) -> None:
    a, b = (create_context(name, 5 * GB) for name in "ab")
    data = {}
    for mark, context in enumerate((a, b), start=1):
        with context_session(context):
            data[context] = torch.full((4 * GB // 4,), mark, dtype=torch.int32, device="cuda")
    errors: list[BaseException] = []

    def use(context: pgk.ExecutionContext, mark: int) -> None:
        for _ in range(10):
            try:
                with context_session(context):
                    assert data[context].eq(mark).all().item()
            except torch.OutOfMemoryError:
                time.sleep(0.01)  # the other one is in use
            except BaseException as error:
                errors.append(error)

    threads = [
        threading.Thread(target=partial(use, context, mark))
        for mark, context in enumerate((a, b, a, b), start=0)
        for mark in (1 + mark % 2,)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    data.clear()
