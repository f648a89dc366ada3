"""Tensors for other processes, and what sessions are told of memory."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from pygpukit_torch import GB, MB, context_session, create_context, share
from tests.gpu.beside import beside
from tests.gpu.mover import Mover

pytestmark = pytest.mark.usefixtures("check_invariants")


def test_a_shared_copy_belongs_to_no_context() -> None:
    context = create_context("a", GB)
    with context_session(context):
        x = torch.arange(MB, device="cuda").reshape(1024, 1024).t()
        used, before = context.usage().used, torch.cuda.memory_allocated()
        copy = share(x)
        assert context.usage().used == used
        assert torch.cuda.memory_allocated() - before == copy.nbytes
        assert torch.equal(copy, x)
        assert share(x[:0]).numel() == 0
    context.evict()
    assert copy[0, 1].item() == 1024


def test_copies_are_right_while_their_source_moves() -> None:
    context = create_context("a", GB)
    with context_session(context):
        x = torch.arange(16 * MB, device="cuda")
    total = x.sum().item()
    with beside(Mover(context)):
        for _ in range(30):
            assert share(x).sum().item() == total


def test_another_process_reads_a_copy_and_is_never_sent_the_original() -> None:
    processes = torch.multiprocessing.get_context("spawn")
    queue, answers = processes.Queue(), processes.Queue()
    child = processes.Process(target=total, args=(queue, answers))
    child.start()
    with context_session(create_context("a", GB)):
        x = torch.arange(1000, device="cuda")
        model = torch.nn.Linear(4, 4).cuda()
        for what in (x, {"x": [x]}, model):
            with pytest.raises(RuntimeError, match=r"context 'a' cannot be shared.*share\("):
                queue.put(what)
        copy = share(x)
        torch.cuda.current_stream().synchronize()
        queue.put(copy)
    assert answers.get(timeout=60) == 499500
    child.join(60)
    assert child.exitcode == 0


def total(queue: multiprocessing.Queue[torch.Tensor], answers: multiprocessing.Queue[int]) -> None:
    answers.put(int(queue.get(timeout=60).sum()))


def test_free_memory_is_the_contexts_in_a_session_and_the_devices_outside() -> None:
    free, total_memory = torch.cuda.mem_get_info()
    assert total_memory > 4 * GB
    with context_session(create_context("a", GB)):
        assert torch.cuda.mem_get_info() == torch.cuda.mem_get_info("cuda:0") == (GB, GB)
        x = torch.ones(256 * MB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.mem_get_info() == torch.cuda.memory.mem_get_info(0) == (768 * MB, GB)
        assert torch.cuda.get_device_properties(0).total_memory > 4 * GB
    assert torch.cuda.mem_get_info()[1] == total_memory
    assert x[-1].item() == 1
    assert free > GB


def test_device_map_auto_fits_into_the_budget(tmp_path: object) -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_max_memory

    layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(64)))
    with context_session(create_context("a", 128 * MB)):
        assert get_max_memory()[0] <= 128 * MB
        places = infer_auto_device_map(layers)
    assert set(places.values()) > {0}, "256 MiB do not fit into 128"


def test_figures_of_a_context_have_all_of_torchs_keys() -> None:
    context = create_context("a", GB)
    with context_session(context):
        small, large = torch.ones(1000, device="cuda"), torch.ones(4 * MB, device="cuda")
        stats, own = torch.cuda.memory_stats(), context.memory_stats()
    assert set(stats) <= set(own)
    assert own["allocated_bytes.small_pool.current"] == small.nbytes + 96
    assert own["allocated_bytes.large_pool.current"] == large.nbytes
    for name in stats:
        if ".all." in name and not name.endswith("peak"):
            pools = (
                stats[name.replace(".all.", pool)] for pool in (".small_pool.", ".large_pool.")
            )
            assert stats[name] == sum(pools), name
    assert "GPU reserved memory" in context.memory_summary()


def test_torch_never_says_that_more_is_allocated_than_reserved() -> None:
    context = create_context("a", GB)
    with context_session(context):
        x = torch.ones(128 * MB, device="cuda")
    before = torch.cuda.memory_allocated()
    context.evict()
    torch.cuda.empty_cache()
    assert before - torch.cuda.memory_allocated() == x.nbytes
    with beside(Mover(context)):
        for _ in range(300):
            stats = torch.cuda.memory_stats()
            reserved = stats["reserved_bytes.all.current"]
            assert 0 <= stats["allocated_bytes.all.current"] <= reserved
    context.restore()
    assert torch.cuda.memory_allocated() == before
