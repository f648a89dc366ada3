"""Runs the snippets of docs/guide.md as they stand there."""

import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, ContextBusyError, native

GUIDE = (Path(__file__).parents[2] / "docs/guide.md").read_text()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Every snippet starts without a device, as in a new process."""
    pgk.shutdown()
    yield
    for context in pgk.list_contexts():
        context.destroy()
    pgk.shutdown()


def snippet(chapter: str) -> str:
    """The one code block of a chapter."""
    text = re.search(
        rf"^## {re.escape(chapter)}\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE
    )
    assert text, f"the guide has no chapter {chapter!r}"
    (code,) = re.findall(r"^```python\n(.*?)^```", text[1], re.DOTALL | re.MULTILINE)
    return str(code)


def run(chapter: str, **names: Any) -> dict[str, Any]:
    """Execute a chapter's snippet with ``names`` defined; returns what it defined."""
    exec(compile(snippet(chapter), f"guide: {chapter}", "exec"), names)
    return names


def test_creating_contexts() -> None:
    names = run("Creating Contexts")
    assert [(c.name, c.max_vram) for c in pgk.list_contexts()] == [
        ("llm", 4 * GB),
        ("tts", 2 * GB),
        ("vision", GB),
    ]
    assert names["llm_ctx"] is pgk.get_context("llm")


def test_finding_and_resizing_contexts(capsys: pytest.CaptureFixture[str]) -> None:
    context = run("Finding and Resizing Contexts")["ctx"]
    assert capsys.readouterr().out == "['chat']\n"
    assert (context.max_vram, context.base_vram) == (512 * MB, 256 * MB)


def test_settings_are_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = GUIDE[GUIDE.index("\n## Settings\n") :]
    rows = re.findall(r"^\| `(\w+)`[^|]* \| `(\w+)` \|", text, re.MULTILINE)
    switches = {"install", "session_mem_info"}
    arguments = [
        name for name in inspect.signature(pgk.initialize).parameters if name not in switches
    ]
    assert sorted(rows) == sorted((name, f"PYGPUKIT_{name.upper()}") for name in arguments)
    monkeypatch.setenv("PYGPUKIT_DEVICE", "cpu")
    monkeypatch.setenv("PYGPUKIT_TOTAL_VRAM", str(64 * MB))
    pgk.initialize()
    assert pgk.get_available_vram() == 64 * MB


def test_running_with_context_sessions() -> None:
    llm = pgk.create_context("llm", 4 * GB)
    tts = pgk.create_context("tts", 2 * GB)
    model = torch.nn.Linear(256, 256).requires_grad_(False)
    charged: dict[str, Any] = {}

    def run_llm_inference(prompt: str) -> torch.Tensor:
        charged[prompt] = pgk.current_context()
        return model(torch.ones(64, 256))

    def run_tts(text: str) -> torch.Tensor:
        charged[text] = pgk.current_context()
        return torch.zeros(16000)

    names = run(
        "Running with Context Sessions",
        llm_ctx=llm,
        tts_ctx=tts,
        prompt="p",
        text="t",
        run_llm_inference=run_llm_inference,
        run_tts=run_tts,
    )
    assert charged == {"p": llm, "t": tts}
    assert torch.equal(names["result"], model(torch.ones(64, 256)))
    assert llm.usage().used == 64 * 256 * 4
    assert tts.usage().used == 64_000
    assert pgk.current_context() is None


async def infer(name: str, layer: torch.nn.Module, *shape: int) -> torch.Tensor:
    """Some layers of a model and some awaits, in the context of that name all the time."""
    data = torch.ones(shape)
    for turn in range(10):
        context = pgk.current_context()
        assert context is not None
        assert context.name == name
        assert native.current_host_stream() == context.stream.id
        data = layer(data)
        await asyncio.sleep(0.001 if turn == 5 else 0)
    return data


def test_async_concurrent_execution() -> None:
    llm = pgk.create_context("llm", 4 * GB)
    tts = pgk.create_context("tts", 2 * GB)
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    order: list[str] = []

    async def llm_inference_async(prompt: str) -> torch.Tensor:
        order.append("llm begins")
        result = await infer("llm", layer, 16, 64)
        order.append("llm ends")
        return result

    async def tts_synthesis_async(text: str) -> torch.Tensor:
        order.append("tts begins")
        return await infer("tts", layer, 32, 64)

    names = run(
        "Async Concurrent Execution",
        llm_ctx=llm,
        tts_ctx=tts,
        llm_inference_async=llm_inference_async,
        tts_synthesis_async=tts_synthesis_async,
    )
    assert order == ["llm begins", "tts begins", "llm ends"]
    text, audio = names["result"]
    assert llm.usage().used == text.nbytes == 16 * 64 * 4
    assert tts.usage().used == audio.nbytes == 32 * 64 * 4
    assert llm.state == tts.state == "idle"
    assert pgk.current_context() is None


def test_limiting_sessions() -> None:
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    inside = most = 0

    async def llm_inference_async(prompt: str) -> str:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await infer("llm", layer, 16, 64)
        inside -= 1
        return prompt.upper()

    names = run(
        "Limiting Sessions", llm_inference_async=llm_inference_async, prompts=["a", "b", "c", "d"]
    )
    assert names["answers"] == ["A", "B", "C", "D"]
    assert most == names["llm_ctx"].max_sessions == 2


def test_complete_example() -> None:
    layer = torch.nn.Linear(64, 64).requires_grad_(False)

    async def generate_response(user_input: str) -> str:
        return f"{user_input}: {(await infer('llm', layer, 16, 64)).shape[0]}"

    async def analyze_images(user_input: str) -> int:
        return (await infer("vision", layer, 8, 64)).numel()

    async def synthesize_speech(text: str) -> torch.Tensor:
        return await infer("tts", layer, len(text), 64)

    names = run(
        "Complete Example",
        generate_response=generate_response,
        analyze_images=analyze_images,
        synthesize_speech=synthesize_speech,
    )
    result = names["result"]
    assert result["text"] == "Describe this image and tell me a story: 16. 512"
    assert result["audio"].shape == (len(result["text"]), 64)
    assert names["tts_ctx"].usage().used == (result["audio"].nbytes + 511) // 512 * 512
    assert all(context.state == "idle" for context in pgk.list_contexts())


def test_vram_budgeting(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("VRAM Budgeting")
    assert names["available"] == 8 * GB
    assert capsys.readouterr().out == "Available VRAM: 8.0 GB\nUsed: 0.0 GB\nMax: 4.0 GB\n"
    with pgk.context_session(names["ctx"]):
        tensor = torch.empty(512 * MB, dtype=torch.uint8)
    assert pgk.get_context_usage(names["ctx"]).used == tensor.nbytes


def test_out_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    run("Out of memory")
    assert capsys.readouterr().out == (
        f"small {2 * GB} {GB} the request does not fit into its budget\n['small']\n"
    )


def test_setting_qos_policy() -> None:
    names = run("Setting QoS Policy")
    llm, tts, background = names["llm_ctx"], names["tts_ctx"], names["bg_ctx"]
    assert [c.qos for c in (llm, tts, background)] == list(pgk.QoSPolicy)
    assert [c.base_vram for c in (llm, tts, background)] == [4 * GB, GB, 0]
    assert pgk.get_available_vram() == 3 * GB
    assert pgk.stats().pooled == 5 * GB, "reservations are made at once"
    with pytest.raises(pgk.AdmissionError):
        pgk.create_context("another", 3 * GB + 2 * MB, qos=pgk.QoSPolicy.GUARANTEED)
    with pgk.context_session(background), pytest.raises(torch.OutOfMemoryError):
        torch.empty(GB + 1, dtype=torch.uint8)


def test_memory_pressure_handling(capsys: pytest.CaptureFixture[str]) -> None:
    pgk.initialize(device="cpu", total_vram=64 * MB, host_backup=256 * MB)
    names = run("Memory Pressure Handling")
    first, second = (names["create_context"](name, 64 * MB) for name in ("first", "second"))
    with pgk.context_session(first):
        kept = torch.full((40 * MB,), 7, dtype=torch.uint8)
    assert capsys.readouterr().out == ""
    with pgk.context_session(second):
        other = torch.zeros(48 * MB, dtype=torch.uint8)
    requested, available = 48 * MB, 64 * MB
    assert capsys.readouterr().out == (
        f"Context second: requested {requested}, available {available}\n"
    )
    assert first.usage().evicted == 24 * MB
    assert kept.eq(7).all()
    assert other.max() == 0


def test_explicit_stream_control(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("Explicit Stream Control")
    assert names["stream"] is names["ctx"].stream
    assert capsys.readouterr().out == f"Stream ID: {names['stream'].id}\n"


def test_stream_events() -> None:
    consumed: list[float] = []

    def produce_data() -> torch.Tensor:
        return torch.full((1000,), 3.0)

    def consume_data(data: torch.Tensor) -> None:
        context = pgk.current_context()
        assert context is not None
        assert context.name == "consumer"
        consumed.append(float(data.sum()))

    names = run("Stream Events", produce_data=produce_data, consume_data=consume_data)
    assert consumed == [3000.0]
    assert names["event"].query()
    assert names["ctx1"].usage().used == 4096


def test_memory_pool(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("Memory Pool")
    assert capsys.readouterr().out == "Allocated: 0\nFree blocks: 1\n"
    pool = names["pool"]
    block = pool.allocate(4096)
    assert pool.stats().reuse_count == 1
    assert block.as_tensor(torch.float16).data_ptr() == block.ptr


def test_gpu_partitioning(capsys: pytest.CaptureFixture[str]) -> None:
    pgk.initialize(device="cpu")
    with pytest.warns(UserWarning, match="limits no computation"):
        names = run("GPU Partitioning")
    assert capsys.readouterr().out == f"Memory limit: {4 * GB}\nCompute limit: 0.5\n"
    manager = names["manager"]
    assert manager.partition_ids == ["inference", "training"]
    stats = manager.stats()
    assert (stats.available_memory, stats.total_compute_allocated) == (0, 1.0)
    context = pgk.create_context("llm", 2 * GB, partition="inference")
    assert manager.get("inference").contexts == ["llm"]
    with pytest.raises(ContextBusyError):
        manager.delete_partition("inference")
    context.destroy()
    manager.delete_partition("inference")


def test_qos_policy_evaluator(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("QoS Policy Evaluator")
    assert capsys.readouterr().out == "Task admitted with priority 100\n"
    evaluator, result = names["evaluator"], names["result"]
    assert (result.decision, result.reserved_memory) == ("admit", 256 * MB)
    assert evaluator.stats().available_memory == 8 * GB, "evaluating reserves nothing"
    evaluator.reserve(result)
    assert evaluator.stats().guaranteed_memory == 256 * MB
    large = native.QosTaskMeta.guaranteed("inference-2", "another", 8 * GB)
    refused = evaluator.evaluate(large)
    assert (refused.decision, refused.admitted) == ("queue", False)
    assert "8.00 GiB does not fit: 7.75 GiB" in refused.reason
    evaluator.reserve(refused)
    (admitted,) = evaluator.release("inference-1")
    assert (admitted.task_id, admitted.decision) == ("inference-2", "admit")


def test_background_work_that_waits() -> None:
    done: list[str | None] = []

    def batch_job() -> torch.Tensor:
        current = pgk.current_context()
        done.append(current and current.name)
        return torch.ones(3) * 2

    names = run("Background work that waits", batch_job=batch_job)
    assert done == ["batch"]
    assert names["batch"].yields
    assert not names["serving"].yields
    assert torch.equal(names["result"], torch.full((3,), 2.0))


def test_recording_allocations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(1000, 1000)

    def train_step() -> None:
        model(torch.ones(8, 1000)).sum().backward()

    names = run("Recording allocations", train_step=train_step)
    trace = names["trace"]
    assert trace == names["recording"].trace
    assert 4 * 1000 * 1000 < trace.peak_live_bytes < 5 * 1000 * 1000
    # Pages of the budget given are of 16 MiB.
    ratio = 16 * MB / trace.peak_live_bytes
    assert f"{len(trace)} events, reserved {ratio:.2f} times" in capsys.readouterr().out


def test_every_snippet_of_the_guide_is_tested() -> None:
    chapters = re.findall(r"^## (.*)\n(?:(?!^## ).*\n)*?```python", GUIDE, re.MULTILINE)
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert chapters
    for chapter in chapters:
        assert chapter.lower().replace(" ", "_") in tests
