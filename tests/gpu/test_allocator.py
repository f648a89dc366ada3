"""CUDA tensors in sessions: whose memory they are, what torch says of it, what is refused."""

from __future__ import annotations

import random

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, QoSPolicy, context_session, create_context, native
from tests.gpu.beside import at_once
from tests.gpu.short_processes import run_python

pytestmark = pytest.mark.usefixtures("check_invariants")


def allocated() -> int:
    return torch.cuda.memory_allocated()


def test_a_session_serves_from_its_context_and_others_from_native() -> None:
    context = create_context("a", GB)
    before = allocated()
    outside = torch.ones(1000, device="cuda")
    with context_session(context):
        inside = torch.ones(MB, device="cuda")
        assert torch.cuda.current_stream().cuda_stream == context.stream.id
        assert context._native.block_bytes(inside.data_ptr()) == 4 * MB
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not context._native.block_bytes(outside.data_ptr())
    assert context.usage().used == 4 * MB
    assert allocated() - before == 4 * MB + 4096
    assert (inside.sum() + outside.sum()).item() == MB + 1000
    del inside, outside
    assert context.usage().used == 0
    assert allocated() == before


def test_statistics_are_natives_and_the_contexts() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    base, reserved = allocated(), torch.cuda.memory_reserved()
    context = create_context("a", GB, base_vram=512 * MB)
    assert torch.cuda.memory_reserved() - reserved == 512 * MB
    with context_session(context):
        tensors = [torch.empty(100 * MB, dtype=torch.uint8, device="cuda") for _ in range(6)]
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] - base == 600 * MB
    assert stats["allocation.all.allocated"] == 6
    assert torch.cuda.memory_reserved() - reserved >= 600 * MB
    del tensors[1:]
    assert allocated() - base == 100 * MB
    assert torch.cuda.max_memory_allocated() - base == 600 * MB
    assert torch.cuda.memory_stats()["allocated_bytes.all.freed"] == 500 * MB
    assert torch.cuda.memory_stats()["allocation.all.freed"] == 5
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() - base == 100 * MB
    assert torch.accelerator.memory_allocated() == allocated()
    assert torch.accelerator.memory_reserved() == torch.cuda.memory_reserved()
    torch.accelerator.empty_cache()
    # What is left is the reservation, all of whose pages exist, and the pages of one tensor.
    assert torch.cuda.memory_reserved() - reserved == 512 * MB
    assert context.usage().reserved <= 128 * MB
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() - base == 100 * MB


def test_an_overrun_is_torchs_error_with_our_message_and_leaves_everything_usable() -> None:
    context = create_context("small", 256 * MB, qos=QoSPolicy.GUARANTEED)
    seen: list[tuple[int, int]] = []
    torch._C._cuda_attach_out_of_memory_observer(
        lambda device, size, total, free: seen.append((device, size))
    )
    with context_session(context):
        kept = torch.ones(100 * MB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
        assert torch.ones(100 * MB, dtype=torch.uint8, device="cuda").min().item() == 1
    text = str(caught.value)
    assert text.startswith("CUDA out of memory. Tried to allocate 200.00 MiB. GPU 0 has a total")
    assert "Context 'small' (guaranteed) has 100.00 MiB of its budget of 256.00 MiB in use" in text
    assert "small 256.00 MiB (guaranteed, base 256.00 MiB, in use)" in text
    assert (0, 200 * MB) in seen
    assert kept.min().item() == 1
    assert context.memory_stats()["num_ooms"] == 1


def test_what_a_context_reserves_native_does_not_get_and_idle_memory_it_does() -> None:
    free = torch.cuda.mem_get_info()[0]
    guaranteed = create_context("guaranteed", 2 * GB, qos=QoSPolicy.GUARANTEED)
    assert free - torch.cuda.mem_get_info()[0] >= 2 * GB
    burst = create_context("burst", 8 * GB)
    with context_session(burst):
        torch.empty(6 * GB, dtype=torch.uint8, device="cuda")
    held = torch.cuda.mem_get_info()[0]
    # Native wants more than is free: pages that contexts only keep for reuse go to it.
    hog = torch.empty(held + 2 * GB, dtype=torch.uint8, device="cuda")
    assert burst.usage().reserved == 0
    del hog
    torch.cuda.empty_cache()
    with context_session(guaranteed):
        assert torch.ones(GB, dtype=torch.uint8, device="cuda").min().item() == 1


def test_natives_cache_goes_to_a_context_that_needs_it() -> None:
    context = create_context("a", 8 * GB)
    free = torch.cuda.mem_get_info()[0]
    torch.empty(free - 2 * GB, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info()[0] < 3 * GB
    with context_session(context):
        assert torch.empty(6 * GB, dtype=torch.uint8, device="cuda").numel() == 6 * GB


@pytest.mark.parametrize("where", ["outside", "another session", "another thread"])
def test_memory_freed_elsewhere_is_not_reused_before_its_users_are_done(where: str) -> None:
    """A slow reader on another stream; the owner goes on allocating at once."""
    owner, other = create_context("owner", GB), create_context("other", GB)
    with context_session(owner):
        data = torch.full((64 * MB,), 7, dtype=torch.uint8, device="cuda")
    reader = other if where == "another session" else None
    results: list[torch.Tensor] = []

    def read() -> None:
        nonlocal data
        torch.cuda._sleep(300_000_000)
        results.append(data.to(torch.int32).sum())
        del data

    def reuse() -> None:
        with context_session(owner, wait=False):
            for _ in range(4):
                torch.full((64 * MB,), 9, dtype=torch.uint8, device="cuda")

    if reader is not None:
        with context_session(reader, wait=False):
            read()
    elif where == "another thread":
        at_once(read)
    else:
        read()
    at_once(reuse)
    torch.cuda.synchronize()
    assert results[0].item() == 7 * 64 * MB


def test_record_stream_keeps_a_block_until_the_stream_has_passed() -> None:
    context = create_context("a", GB)
    side = torch.cuda.Stream()
    with context_session(context):
        data = torch.full((64 * MB,), 3, dtype=torch.uint8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(300_000_000)
            total = data.to(torch.int32).sum()
        data.record_stream(side)
        address = data.data_ptr()
        del data
        fresh = torch.full((64 * MB,), 5, dtype=torch.uint8, device="cuda")
        assert fresh.data_ptr() != address
        side.synchronize()
        assert total.item() == 3 * 64 * MB
    assert context.usage().used >= 64 * MB


def test_side_streams_do_not_share_free_memory_without_order() -> None:
    context = create_context("a", 256 * MB)
    side = torch.cuda.Stream()
    with context_session(context):
        with torch.cuda.stream(side):
            torch.cuda._sleep(300_000_000)
            first = torch.full((200 * MB,), 1, dtype=torch.uint8, device="cuda")
            least = first.min()
            del first  # reusable in the order of the side stream
        # Nothing else is free: the context's stream gets it, after the side stream.
        second = torch.full((200 * MB,), 0, dtype=torch.uint8, device="cuda")
        side.synchronize()
        assert least.item() == 1
        assert second.max().item() == 0


def test_record_stream_of_native_memory_still_works() -> None:
    side = torch.cuda.Stream()
    data = torch.ones(MB, device="cuda")
    address = data.data_ptr()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
    data.record_stream(side)
    del data
    assert torch.empty(MB, device="cuda").data_ptr() != address


def test_cublas_workspaces_are_charged_and_go_with_their_context() -> None:
    context = create_context("a", GB)
    with context_session(context):
        x = torch.ones(512, 512, device="cuda", dtype=torch.bfloat16)
        (x @ x).sum().item()
        del x
    workspace = context.usage().used
    assert workspace >= MB
    before = allocated()
    context.destroy()
    assert before - allocated() >= workspace
    assert [entry.name for entry in pgk.stats().contexts] == []


def test_ipc_is_refused_with_a_reason() -> None:
    context = create_context("a", GB)
    with context_session(context):
        x = torch.ones(10, device="cuda")
    with pytest.raises(RuntimeError, match="memory of context 'a' cannot be shared"):
        x.untyped_storage()._share_cuda_()


def test_other_devices_tensors_and_cpu_tensors_are_left_alone() -> None:
    context = create_context("a", GB)
    with context_session(context):
        torch.ones(1000)
        torch.empty(0, device="cuda")
    assert context.usage().used == 0


def test_place_brings_a_model_into_the_context() -> None:
    context = create_context("a", GB)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.BatchNorm1d(256))
    expected = model(x := torch.randn(8, 256))
    assert context.place(model) is model
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert size <= context.usage().used <= size + 7 * 512
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_pgk_malloc_serves_a_mempool() -> None:
    pair = torch.cuda.memory.CUDAPluggableAllocator(native.__file__, "pgk_malloc", "pgk_free")
    pool = torch.cuda.MemPool(pair.allocator())
    context = create_context("a", GB)
    before = allocated()
    with context_session(context), torch.cuda.use_mem_pool(pool):
        x = torch.ones(4 * MB, device="cuda")
    assert 16 * MB <= context.usage().used < 40 * MB
    assert allocated() - before == 16 * MB  # the segment is not counted beside what is in it
    assert x.sum().item() == 4 * MB
    with (
        pytest.raises(RuntimeError, match="pgk_malloc serves threads in a session"),
        torch.cuda.use_mem_pool(pool),
    ):
        torch.ones(100 * MB, device="cuda")
    del x, pool
    torch.cuda.empty_cache()
    assert context.usage().used == 0


def test_a_random_walk_agrees_with_a_reference_count() -> None:
    """10,000 allocations in five contexts and in native memory, with contents."""
    choice = random.Random(5)
    torch.cuda.empty_cache()
    torch.cuda.reset_accumulated_memory_stats()
    base = allocated()
    contexts: list[pgk.ExecutionContext | None] = [
        create_context("guaranteed", 2 * GB, qos=QoSPolicy.GUARANTEED),
        create_context("burst", 4 * GB, base_vram=GB),
        create_context("small", 64 * MB),
        create_context("spare", 2 * GB, qos=QoSPolicy.BEST_EFFORT),
        create_context("tight", 256 * MB),
        None,
    ]
    used = dict.fromkeys(range(6), 0)
    live: list[tuple[int, torch.Tensor, int]] = []
    made = refused = 0

    def rounded(tensor: torch.Tensor) -> int:
        return -(-tensor.numel() // 512) * 512

    while made < 10_000:
        if live and choice.random() < 0.49:
            which, tensor, mark = live.pop(choice.randrange(len(live)))
            used[which] -= rounded(tensor)
            if choice.random() < 0.05:
                # wait=False: nothing else orders what follows behind the session's work.
                if (context := contexts[which]) is not None:
                    context.stream.synchronize()
                assert tensor[0].item() == mark
                assert tensor[-1].item() == mark
            del tensor
        else:
            which = choice.randrange(6)
            context, mark = contexts[which], made % 251
            # Native does not split blocks beyond 1 MiB exactly, so that its sum would be another.
            size = int(2 ** choice.uniform(4, 27 if context else 20))
            try:
                if context is None:
                    tensor = torch.full((size,), mark, dtype=torch.uint8, device="cuda")
                else:
                    with context_session(context, wait=False):
                        tensor = torch.full((size,), mark, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError:
                refused += 1
            else:
                made += 1
                used[which] += rounded(tensor)
                live.append((which, tensor, mark))
                del tensor
        if made % 250 == 0:
            torch.cuda.synchronize()
            assert allocated() - base == sum(used.values())
            for which, context in enumerate(contexts):
                if context is not None:
                    assert context.usage().used == used[which]
    stats = torch.cuda.memory_stats()
    assert stats["allocation.all.allocated"] == made
    assert refused > 0
    torch.cuda.synchronize()
    for _, tensor, mark in live:
        assert tensor[0].item() == mark
        assert tensor[-1].item() == mark
    live.clear()
    del tensor
    torch.cuda.synchronize()
    assert allocated() == base
    assert torch.cuda.memory_stats()["allocation.all.freed"] >= made


@pytest.mark.parametrize("seconds", [0, 0.1])
def test_a_process_can_end_while_host_memory_is_made(seconds: float) -> None:
    said = run_python(f"""
        import time, pygpukit_torch as pgk
        pgk.initialize(device="cuda", total_vram=4 * pgk.GB, host_backup=16 * pgk.GB)
        for name in "abcd":
            pgk.create_context(name, 4 * pgk.GB)
        time.sleep({seconds})
        print(pgk.stats().host_reserved < 12 * pgk.GB)
    """)
    assert said == "True"


USE = """
    import torch, pygpukit_torch as pgk
    early = {early}
    if early: held = torch.ones(1000, device="cuda")
    pgk.initialize(device="cuda")
    context = pgk.create_context("a", pgk.GB)
    with pgk.context_session(context):
        x = torch.ones(1000, device="cuda")
    assert context.usage().used == 4096, context.usage()
    assert torch.cuda.get_allocator_backend() == "pygpukit_torch"
    assert torch.accelerator.memory_allocated() == torch.cuda.memory_allocated()
    if early: assert held.sum().item() == 1000; del held
    assert torch.cuda.memory_allocated() == 4096
    del x
    context.destroy()
    pgk.shutdown()
    assert torch.cuda.get_allocator_backend() == "native"
    pgk.initialize(device="cuda")
    with pgk.context_session(pgk.create_context("b", pgk.GB)) as session:
        y = torch.ones(1000, device="cuda")
        assert session.context.usage().used == 4096
    print("fine")
"""


@pytest.mark.parametrize("early", [True, False])
def test_installation_before_and_after_cuda_is_in_use(early: bool) -> None:
    assert run_python(USE.format(early=early)) == "fine"


def test_another_backend_is_refused() -> None:
    code = """
        import torch, pygpukit_torch as pgk
        try:
            pgk.initialize(device="cuda")
        except pgk.InitializationError as error:
            print(error)
        assert torch.ones(10, device="cuda").sum().item() == 10
        pgk.initialize(device="cuda", install=False)
        pgk.create_context("a", pgk.GB).destroy()
    """
    text = run_python(code, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    assert text.startswith("torch's CUDA allocator is 'cudaMallocAsync', but only its native one")


def test_an_exit_with_live_tensors_sessions_and_threads_is_clean() -> None:
    code = """
        import threading, time, torch, pygpukit_torch as pgk
        context = pgk.create_context("a", pgk.GB)
        session = pgk.context_session(context)
        session.__enter__()
        x = torch.ones(1000, device="cuda")
        inside = threading.Event()
        def linger():
            with pgk.context_session(context):
                kept = torch.ones(100, device="cuda")
                inside.set()
                time.sleep(1000)
        threading.Thread(target=linger, daemon=True).start()
        inside.wait()
        print("end")
    """
    assert run_python(code) == "end"
