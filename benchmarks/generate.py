"""Tokens a second of a Llama's ``generate`` inside a session, against outside, in turns."""

import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pygpukit_torch as pgk
from benchmarks.report import Report
from pygpukit_torch import GB

NEW_TOKENS = 128


def run(quick: bool) -> Report:
    """Measure. ``quick`` runs fewer repetitions."""
    repetitions = 3 if quick else 9
    pgk.initialize(device="cuda")
    context = pgk.create_context("llm", 8 * GB, qos=pgk.QoSPolicy.GUARANTEED)
    report = Report(
        "generate",
        f"tokens a second of {NEW_TOKENS} new tokens, median",
        ["batch", "outside", "session", "outside spread", "session spread", "ratio"],
    )
    models = {"outside": _llama().cuda()}
    with pgk.context_session(context):
        models["session"] = _llama().cuda()
    for batch in (1, 16):
        ids = torch.randint(2, 32000, (batch, 64), device="cuda")

        def rate(model: LlamaForCausalLM, ids: torch.Tensor = ids, batch: int = batch) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            torch.cuda.synchronize()
            return NEW_TOKENS * batch / (time.perf_counter() - start)

        def rate_in_session() -> float:
            with pgk.context_session(context):
                return rate(models["session"])

        rate(models["outside"])
        rate_in_session()
        rates: list[tuple[float, float]] = []
        for turn in range(repetitions):
            # Who comes first changes, so that a drift of the clocks favours nobody.
            if turn % 2:
                first = rate_in_session()
                rates.append((rate(models["outside"]), first))
            else:
                rates.append((rate(models["outside"]), rate_in_session()))
        plain, session = zip(*rates, strict=True)
        report.rows.append(
            {
                "batch": batch,
                "outside": statistics.median(plain),
                "session": statistics.median(session),
                "outside spread": _quartiles(plain),
                "session spread": _quartiles(session),
                "ratio": statistics.median(session) / statistics.median(plain),
            }
        )
    models.clear()
    context.destroy()
    pgk.shutdown()
    return report


def llama_config(hidden: int = 2048, layers: int = 16) -> LlamaConfig:
    """Return a Llama's shape: 0.9 billion parameters, unless told otherwise."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        pad_token_id=0,
        eos_token_id=None,
    )


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).to(torch.bfloat16).eval()


def _quartiles(values: tuple[float, ...]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.0f}-{high:.0f}"
