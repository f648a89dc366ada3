"""Partitions on a GPU: kernels run on the SMs that were granted, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import (
    GB,
    MB,
    AdmissionError,
    ExecutionContext,
    QoSPolicy,
    context_session,
    create_context,
    native,
)
from pygpukit_torch.native import PartitionConfig, PartitionLimits, PartitionManager
from tests.gpu.beside import at_once, beside
from tests.gpu.models import llama, tokens

pytestmark = pytest.mark.usefixtures("check_invariants")

# Marks the SM of every block; each stays there for a while, so that all SMs are needed.
SOURCE = """
extern "C" __global__ void mark(int* marks) {
  unsigned sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  const long long start = clock64();
  while (clock64() - start < 20000) {}
  marks[sm] = 1;
}
"""
MOST_SMS = 1024
BLOCKS = 8192


@pytest.fixture(scope="module")
def kernel() -> object:
    return torch.cuda._compile_kernel(SOURCE, "mark")


@pytest.fixture
def partitions(cuda: None) -> Iterator[PartitionManager]:
    manager = PartitionManager(PartitionConfig(16 * GB))
    if not pgk.scheduler._runtime.get_or_initialize().device.processor_groups:
        pytest.fail("this driver cannot divide the SMs")
    yield manager
    for context in pgk.list_contexts():
        context.destroy()
    for id in manager.partition_ids:
        manager.delete_partition(id)


def launch(kernel: object, marks: torch.Tensor) -> None:
    kernel((BLOCKS, 1, 1), (64, 1, 1), (marks,))  # type: ignore[operator]


def sms_of(kernel: object, context: ExecutionContext) -> set[int]:
    """Those that a kernel in a session of the context runs on."""
    with context_session(context):
        marks = torch.zeros(MOST_SMS, dtype=torch.int32, device="cuda")
        launch(kernel, marks)
    return set(torch.nonzero(marks).flatten().tolist())


def share(compute: float) -> PartitionLimits:
    return PartitionLimits().compute(compute)


def inside(id: str, **arguments: object) -> ExecutionContext:
    return create_context(f"in {id}", GB, partition=id, **arguments)  # type: ignore[arg-type]


def total_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def test_kernels_run_on_exactly_the_granted_sms(
    kernel: object, partitions: PartitionManager
) -> None:
    granted = {}
    for id, part in (("a", 0.5), ("b", 0.25), ("c", 0.25)):
        granted[id] = partitions.create_partition(id, id, share(part)).sm_count
    used = {id: sms_of(kernel, inside(id)) for id in granted}
    for id, sms in used.items():
        assert len(sms) == granted[id]
    assert sum(map(len, used.values())) == len(set().union(*used.values())) == total_sms()


def test_contexts_without_a_partition_get_the_rest(
    kernel: object, partitions: PartitionManager
) -> None:
    before = create_context("before", GB)
    assert len(sms_of(kernel, before)) == total_sms()
    granted = partitions.create_partition("a", "A", share(0.5)).sm_count
    own = sms_of(kernel, inside("a"))
    after = create_context("after", GB)
    for context in (before, after):
        rest = sms_of(kernel, context)
        assert rest.isdisjoint(own)
        assert len(rest) + len(own) == total_sms()
    assert len(own) == granted
    pgk.get_context("in a").destroy()
    partitions.delete_partition("a")
    assert len(sms_of(kernel, before)) == total_sms()


def test_the_sum_never_exceeds_what_there_is(kernel: object, partitions: PartitionManager) -> None:
    def fill(prefix: str) -> None:
        for i in range(20):
            partitions.create_partition(f"{prefix}-{i}", "", share(0.07 + 0.05 * (i % 3)))

    for round_ in range(4):
        with pytest.raises(AdmissionError):
            fill(str(round_))
        granted = [partitions.get(id).sm_count or 0 for id in partitions.partition_ids]
        assert sum(granted) <= total_sms()
        for id in partitions.partition_ids[:: 2 + round_ % 2]:
            partitions.delete_partition(id)
    sets = [sms_of(kernel, inside(id)) for id in partitions.partition_ids]
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_assigning_moves_the_work(kernel: object, partitions: PartitionManager) -> None:
    partitions.create_partition("a", "A", share(0.5))
    partitions.create_partition("b", "B", share(0.25))
    context = create_context("c", GB)
    with context_session(context):
        x = torch.randn(1024, 1024, device="cuda")
        y = x @ x
    seen = []
    for id in ("a", "b", None, "a"):
        partitions.assign(context, id)
        seen.append(sms_of(kernel, context))
        with context_session(context):
            torch.testing.assert_close(x @ x, y)
    assert seen[0] == seen[3]
    assert seen[0].isdisjoint(seen[1])
    assert seen[2].isdisjoint(seen[0] | seen[1])


def test_graphs_stay_on_the_sms_of_their_context(
    kernel: object, partitions: PartitionManager
) -> None:
    partitions.create_partition("a", "A", share(0.25))
    context = inside("a")
    own = sms_of(kernel, context)
    side = torch.cuda.Stream()
    for stream in (None, side, context.stream):
        graph = torch.cuda.CUDAGraph()
        with context_session(context):
            marks = torch.zeros(MOST_SMS, dtype=torch.int32, device="cuda")
            with torch.cuda.graph(graph, stream=stream):
                launch(kernel, marks)
        for replaying in (context_session(context), torch.cuda.stream(side)):
            marks.zero_()
            torch.cuda.synchronize()
            with replaying:
                graph.replay()
            torch.cuda.synchronize()
            assert set(torch.nonzero(marks).flatten().tolist()) == own
        del graph
    # Outside of sessions, and in contexts that may run on all SMs, torch's stream is used.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph) as _:
        assert torch.cuda.current_stream() == torch.cuda.graph.default_capture_stream


def test_graphs_stay_right_when_the_share_of_their_context_changes(
    kernel: object, partitions: PartitionManager
) -> None:
    for id, part in (("a", 0.5), ("b", 0.25)):
        partitions.create_partition(id, id, share(part))
    context, other = inside("a"), inside("b")
    own = sms_of(kernel, context)
    graph = torch.cuda.CUDAGraph()
    with context_session(context):
        x = torch.ones(512, 512, device="cuda")
        marks = torch.zeros(MOST_SMS, dtype=torch.int32, device="cuda")
        with torch.cuda.graph(graph):
            y = x @ x
            launch(kernel, marks)

    def multiply() -> None:
        with context_session(other):
            z = torch.full((512, 512), 2.0, device="cuda")
            assert (z @ z)[0, 0].item() == 2048

    with beside(multiply):
        for turn, id in enumerate(["b", None, "a", None, "b"] * 4):
            partitions.assign(context, id)
            for value in (turn, turn + 1):
                with context_session(context):
                    x.fill_(value)
                    marks.zero_()
                    graph.replay()
                    assert y[0, 0].item() == value * value * 512
                    (x @ x).sum().item()  # on the stream of the new share
                assert set(torch.nonzero(marks).flatten().tolist()) == own
            if turn % 5 == 3:
                context.evict()


def test_graph_trees_stay_there_too(kernel: object, partitions: PartitionManager) -> None:
    @torch.library.custom_op("pygpukit_test::marked", mutates_args=())
    def marked(x: torch.Tensor) -> torch.Tensor:
        marks = torch.zeros(MOST_SMS, dtype=torch.int32, device="cuda")
        launch(kernel, marks)
        return marks

    @marked.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(MOST_SMS, dtype=torch.int32, device="cuda")

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(x * 2 + 1), marked(x)

    partitions.create_partition("a", "A", share(0.25))
    context = inside("a")
    own = sms_of(kernel, context)
    compiled = torch.compile(step, mode="reduce-overhead")
    with context_session(context):
        for i in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.full((256, 256), float(i), device="cuda")
            y, marks = compiled(x)
            torch.testing.assert_close(y, torch.relu(x * 2 + 1))
            marks = marks.clone()
    assert set(torch.nonzero(marks).flatten().tolist()) == own
    torch.compiler.reset()


def test_streams_carry_the_priority_of_the_tier(partitions: PartitionManager) -> None:
    partitions.create_partition("a", "A", share(0.5))
    for tier, priority in (
        (QoSPolicy.GUARANTEED, -5),
        (QoSPolicy.BURSTABLE, -2),
        (QoSPolicy.BEST_EFFORT, 0),
    ):
        context = create_context(tier.value, 64 * MB, qos=tier, partition="a")
        assert context.stream.priority == priority


def test_borders_are_safe(partitions: PartitionManager) -> None:
    """What is made before a session can be read in it, and results after it, without a wait."""
    partitions.create_partition("a", "A", share(0.25))
    partitions.create_partition("b", "B", share(0.75))
    a, b = inside("a"), inside("b")
    large = torch.randn(4096, 4096, device="cuda")
    for i in range(50):
        made = (large @ large).mul_(0).add_(i)
        with context_session(a):
            first = made + 1
        with context_session(b):
            second = first * 2
        assert int(second[-1, -1].item()) == 2 * (i + 1)
        assert bool((second == 2 * (i + 1)).all())


def test_contexts_of_partitions_are_evicted_and_come_back(partitions: PartitionManager) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(GB).compute(0.25))
    first = create_context("first", GB, partition="a")
    second = create_context("second", GB, partition="a")
    outside = create_context("outside", GB)
    kept = {}
    for i, context in enumerate((outside, first, second)):
        with context_session(context):
            kept[context] = torch.full((700 * MB,), i + 1, dtype=torch.uint8, device="cuda")
    assert outside.usage().evicted == 0
    for _ in range(3):
        for i, context in enumerate((outside, first, second)):
            with context_session(context):
                assert int(kept[context].min()) == int(kept[context].max()) == i + 1
                assert context.usage().evicted == 0
            assert partitions.get("a").usage.reserved <= GB
    assert first.usage().evicted > 0


def test_a_base_is_claimed_from_a_partition_at_work(partitions: PartitionManager) -> None:
    partitions.create_partition("a", "A", PartitionLimits().memory(2 * GB).compute(0.5))
    owner = create_context("owner", GB, qos=QoSPolicy.GUARANTEED, partition="a")
    borrower = create_context("borrower", 2 * GB, qos=QoSPolicy.BEST_EFFORT, partition="a")
    with context_session(borrower):
        numbers = torch.zeros(1800 * MB // 4, dtype=torch.int32, device="cuda")
    turns = 0

    def work() -> None:
        nonlocal turns
        numbers.add_(1)
        borrower.stream.synchronize()
        turns += 1

    with context_session(borrower), beside(work):
        with context_session(owner):
            claimed = torch.full((900 * MB,), 7, dtype=torch.uint8, device="cuda")
        assert borrower.usage().evicted >= 600 * MB
    assert int(claimed.min()) == int(claimed.max()) == 7
    assert owner.usage().reserved >= 900 * MB
    assert int(numbers.min()) == int(numbers.max()) == turns > 0


def test_models_give_the_same_tokens(partitions: PartitionManager) -> None:
    model = llama().to("cuda")
    prompt = tokens(2, 16, 2000)
    arguments = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(prompt, **arguments)
    partitions.create_partition("a", "A", share(0.5))
    partitions.create_partition("b", "B", share(0.5))
    contexts = [inside("a"), inside("b")]

    def generate(context: ExecutionContext) -> None:
        for _ in range(3):
            with context_session(context):
                assert torch.equal(model.generate(prompt, **arguments), expected)

    at_once(*(lambda context=context: generate(context) for context in contexts))


def test_the_device_says_what_it_grants(partitions: PartitionManager) -> None:
    device = native.CudaDevice(0)
    assert sum(device.processor_groups) == total_sms()
    assert len(device.processor_groups) <= 64
