"""Torch on the host device: CPU tensors in sessions, with real models."""

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import pygpukit_torch as pgk
from pygpukit_torch import MB, native

pytestmark = pytest.mark.usefixtures("scheduler")


@pytest.fixture
def context() -> pgk.ExecutionContext:
    return pgk.create_context("a", 64 * MB)


def bytes_of(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def used(context: pgk.ExecutionContext) -> int:
    return context.usage().used


def test_only_sessions_are_charged(context: pgk.ExecutionContext) -> None:
    outside = torch.ones(1000)
    assert used(context) == 0
    with pgk.context_session(context):
        inside = torch.ones(1000)
        assert used(context) == 4096
    more = torch.ones(1000)
    assert used(context) == 4096
    assert torch.equal(inside, outside)
    assert torch.equal(inside, more)


def test_sizes_are_rounded_to_512(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        tensors = [bytes_of(count) for count in (1, 512, 513)]
    assert used(context) == 512 + 512 + 1024
    assert all(tensor.data_ptr() % 512 == 0 for tensor in tensors)


def test_frees_are_credited_wherever_they_happen(context: pgk.ExecutionContext) -> None:
    other = pgk.create_context("b", 64 * MB)
    with pgk.context_session(context):
        tensors = [bytes_of(MB) for _ in range(4)]
    assert used(context) == 4 * MB
    tensors.pop()
    assert used(context) == 3 * MB
    with pgk.context_session(other):
        tensors.pop()
    assert used(context) == 2 * MB
    with ThreadPoolExecutor(1) as pool:
        pool.submit(tensors.pop).result()
    assert used(context) == MB
    assert used(other) == 0


def test_memory_outside_of_sessions_is_freed_inside(context: pgk.ExecutionContext) -> None:
    outside = bytes_of(MB)
    with pgk.context_session(context):
        del outside
    assert used(context) == 0


def test_views_and_resizing(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        tensor = torch.arange(1000)
        view = tensor[10:20]
        del tensor
        assert used(context) == 8192
        view.resize_(100_000)
    assert used(context) > 800_000
    assert view[:10].tolist() == list(range(10, 20))
    view.resize_(200_000)  # outside: the storage moves out of the context
    assert used(context) == 0
    assert view[:10].tolist() == list(range(10, 20))


def test_an_empty_tensor_costs_nothing(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        empty = torch.empty(0)
    assert used(context) == 0
    assert empty.numel() == 0


def test_over_budget_is_torchs_error_and_leaves_all_intact(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        kept = torch.full((1000,), 3.0)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            bytes_of(65 * MB)
        assert type(caught.value) is torch.OutOfMemoryError
        assert "you tried to allocate 68157440 bytes" in str(caught.value)
        assert "Context 'a'" in str(caught.value)
        assert (kept == 3).all()
        again = torch.ones(1000)
    assert used(context) == 2 * 4096
    assert context.memory_stats()["num_ooms"] == 1
    assert again.sum() == 1000


def test_over_budget_in_the_middle_of_a_model(context: pgk.ExecutionContext) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    with pgk.context_session(context), torch.no_grad():
        context.place(model)
        expected = model(torch.ones(10, 100))
        before = used(context)
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.ones(200_000, 100))
        assert used(context) == before
        assert torch.equal(model(torch.ones(10, 100)), expected)


def test_used_and_resident_stay_under_the_budget(context: pgk.ExecutionContext) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: list[torch.Tensor] = []
    with pgk.context_session(context):
        for _ in range(500):
            size = int(torch.randint(1, 8 * MB, (1,), generator=generator))
            try:
                tensors.append(bytes_of(size))
            except torch.OutOfMemoryError:
                del tensors[::2]
            usage = context.usage()
            assert usage.used <= usage.reserved <= usage.max
            assert usage.used <= usage.peak <= usage.max


def test_training_is_charged_and_right(context: pgk.ExecutionContext) -> None:
    def train() -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 1))
        optimizer = torch.optim.Adam(model.parameters())
        inputs, losses = torch.randn(64, 20), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train()
    with pgk.context_session(context):
        assert train() == expected
    gc.collect()
    assert used(context) == 0
    assert context.usage().peak > 0


def test_the_same_model_in_two_contexts_on_two_threads(context: pgk.ExecutionContext) -> None:
    other = pgk.create_context("b", 64 * MB)
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    inputs = torch.randn(4, 16, 32)
    with torch.no_grad():
        expected = model(inputs)

    def work(mine: pgk.ExecutionContext) -> None:
        own = mine.place(copy.deepcopy(model))
        with pgk.context_session(mine), torch.no_grad():
            for _ in range(50):
                assert torch.allclose(own(inputs), expected)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, mine) for mine in (context, other)]:
            future.result()
    assert context.usage().peak > 0
    assert other.usage().peak > 0


def test_torchscript(context: pgk.ExecutionContext) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    inputs = torch.randn(3, 8)
    expected = scripted(inputs)
    with pgk.context_session(context):
        for _ in range(4):
            assert torch.allclose(scripted(inputs), expected)
    assert context.usage().peak > 0


def test_numpy_shares_the_memory(context: pgk.ExecutionContext) -> None:
    with pgk.context_session(context):
        tensor = torch.arange(100)
    array = tensor.numpy()
    del tensor
    assert used(context) == 1024
    assert array.tolist() == list(range(100))
    del array
    assert used(context) == 0


def test_what_torch_takes_from_its_default_allocator_can_be_placed(
    context: pgk.ExecutionContext,
) -> None:
    """deepcopy and pickle make untyped storages, which do not ask for torch's CPU allocator."""
    with pgk.context_session(context):
        tensor = torch.arange(100)
        copies = [copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))]
    assert used(context) == 1024
    placed = [context.place(twin) for twin in copies]
    assert used(context) == 3 * 1024
    assert all(torch.equal(twin, tensor) for twin in placed)


def test_the_profiler_sees_the_memory(context: pgk.ExecutionContext) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with pgk.context_session(context):
            tensor = torch.ones(MB, dtype=torch.uint8)
        del tensor
    assert MB in [event.cpu_memory_usage for event in profile.key_averages()]
    told = [event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
    assert -MB in told


def test_many_threads_allocate_in_one_context(context: pgk.ExecutionContext) -> None:
    def work(index: int) -> None:
        with pgk.context_session(context):
            for step in range(300):
                tensor = torch.full((1000 + 37 * (step % 50),), index)
                assert (tensor == index).all()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, index) for index in range(8)]:
            future.result()
    assert used(context) == 0


def test_tensors_outlive_their_context_and_the_scheduler() -> None:
    context = pgk.create_context("a", 64 * MB)
    with pgk.context_session(context):
        kept = torch.arange(1000)
    context.destroy()
    (orphan,) = pgk.stats().contexts
    assert (orphan.name, orphan.state, orphan.usage.used) == ("a", "destroyed", 8192)
    namesake = pgk.create_context("a", 64 * MB)
    assert used(namesake) == 0
    namesake.destroy()
    pgk.shutdown()
    assert kept.sum() == 499500
    pgk.initialize(device="cpu", total_vram=32 * MB)
    assert kept.sum() == 499500
    del kept
    assert pgk.stats().contexts == ()


def test_the_stock_allocator_is_back_after_shutdown() -> None:
    context = pgk.create_context("a", 64 * MB)
    with pgk.context_session(context):
        inside = torch.ones(10)
    outside = torch.ones(10)
    context.destroy()
    pgk.shutdown()
    assert torch.equal(inside, outside)
    assert torch.equal(torch.ones(10), outside)
    del outside
    pgk.initialize(device="cpu", total_vram=64 * MB)


# place() ------------------------------------------------------------------------------------


def test_place_copies_storage_that_is_not_torchs(context: pgk.ExecutionContext) -> None:
    array = np.arange(1000.0)
    foreign = torch.from_numpy(array)
    placed = context.place(foreign)
    assert used(context) == 8192
    array[0] = 99
    assert placed[0] == 0
    assert torch.equal(placed[1:], foreign[1:])
    assert context.place(placed) is placed


def test_place_keeps_views_types_and_gradients(context: pgk.ExecutionContext) -> None:
    tensor = torch.randn(4, 6, dtype=torch.bfloat16).t()[1:, :2]
    placed = context.place(tensor)
    assert placed.stride() == tensor.stride()
    assert placed.dtype is torch.bfloat16
    assert torch.equal(placed, tensor)
    leaf = torch.ones(3, requires_grad=True)
    assert context.place(leaf).requires_grad


def test_place_moves_a_module_once(context: pgk.ExecutionContext) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(50, 50, bias=False)
            self.second = nn.Linear(50, 50, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("steps", torch.zeros(3))

    model = Tied()
    parameters = list(model.parameters())
    assert context.place(model) is model
    assert used(context) == 10_240 + 512
    assert next(model.parameters()) is parameters[0]
    assert model.second.weight is model.first.weight
    assert isinstance(model.first.weight, nn.Parameter)
    context.place(model)
    assert used(context) == 10_240 + 512


def test_place_takes_gradients_along(context: pgk.ExecutionContext) -> None:
    model = nn.Linear(10, 1)
    model(torch.ones(2, 10)).sum().backward()
    expected = model.weight.grad.clone()  # type: ignore[union-attr]
    context.place(model)
    assert used(context) == 4 * 512
    assert torch.equal(model.weight.grad, expected)  # type: ignore[arg-type]


def test_place_beyond_the_budget_leaves_the_module(context: pgk.ExecutionContext) -> None:
    model = nn.Sequential(nn.Linear(2000, 2000), nn.Linear(4000, 4000))
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(torch.OutOfMemoryError):
        context.place(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert used(context) == 0


def test_place_keeps_lazy_conjugates_and_negations(context: pgk.ExecutionContext) -> None:
    values = torch.randn(4, dtype=torch.cfloat)
    for tensor in (values.conj(), values.conj().imag, values.conj()[1:]):
        assert torch.equal(context.place(tensor), tensor)


def test_place_of_storages_that_share_an_address(context: pgk.ExecutionContext) -> None:
    array = np.arange(100.0)

    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("short", torch.from_numpy(array[:10]))
            self.register_buffer("long", torch.from_numpy(array))

    module = context.place(Overlapping())
    assert module.long.tolist() == array.tolist()
    assert module.short.tolist() == array[:10].tolist()
    assert module.short.data_ptr() == module.long.data_ptr()


def test_place_ignores_the_default_device(context: pgk.ExecutionContext) -> None:
    tensor = torch.arange(10)
    with torch.device("meta"):
        placed = context.place(tensor)
    assert torch.equal(placed, tensor)


def test_place_names_what_it_cannot_place(context: pgk.ExecutionContext) -> None:
    with pytest.raises(TypeError, match=r"the tensor cannot be placed: it is torch.sparse_coo"):
        context.place(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="strided on meta, not a dense CPU tensor"):
        context.place(torch.empty(3, device="meta"))
    with pytest.raises(TypeError, match="it is quantized"):
        context.place(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    embedding = nn.Embedding(4, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="the gradient of 'weight' cannot be placed"):
        context.place(embedding)
    assert used(context) == 0


def test_place_takes_modules_and_tensors_only(context: pgk.ExecutionContext) -> None:
    with pytest.raises(TypeError, match="module or a tensor, got list"):
        context.place([torch.ones(1)])  # type: ignore[type-var]


def test_a_thread_without_a_session_is_not_charged(context: pgk.ExecutionContext) -> None:
    results: list[torch.Tensor] = []
    entered = threading.Event()

    def work() -> None:
        entered.wait()
        results.append(bytes_of(MB))

    thread = threading.Thread(target=work)
    thread.start()
    with pgk.context_session(context):
        entered.set()
        thread.join()
    assert used(context) == 0
    assert native.current_context() is None
