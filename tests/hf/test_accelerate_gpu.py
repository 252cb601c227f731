"""``accelerate`` on a GPU: captured steps, launched ahead, give the default's tokens."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel

from tests.helpers.hf_models import make_model, prompt
from tests.hf.test_accelerate import COLUMNS, accelerated, run, same
from vattn.hf import accelerate

pytestmark = pytest.mark.gpu
# Calls of many sizes, and how long one may take that captures nothing, which takes longer. Under compute-sanitizer
# everything takes ten times as long and more.
CALLS, LATE_S = (25, 20.0) if os.environ.get("VATTN_SHORT") else (100, 1.0)
FAMILIES = ["Llama", "Gemma 3", "Mistral, window 16", "Qwen3-MoE"]


def on_gpu(name: str) -> PreTrainedModel:
    return make_model(name).to("cuda")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    return on_gpu(request.param), on_gpu(request.param)


@pytest.mark.parametrize("column", COLUMNS)
def test_the_tokens_are_the_default_ones(family: tuple[PreTrainedModel, PreTrainedModel], column: str) -> None:
    plain, model = family
    with accelerated(model) as fast:
        same(run(model, column), run(plain, column))
        assert fast.graphs


def test_one_graph_a_batch_size_and_no_outliers() -> None:
    plain, model = on_gpu("Llama"), on_gpu("Llama")
    draw = np.random.default_rng(3)
    seen: set[int] = set()
    late = []
    with accelerated(model) as fast:
        for call in range(CALLS):
            rows, length, new = int(draw.integers(1, 5)), int(draw.integers(1, 40)), int(draw.integers(2, 12))
            tokens = prompt(rows, seed=call, length=length).cuda()
            start = time.perf_counter()
            got = model.generate(tokens, max_new_tokens=new, do_sample=False)
            torch.cuda.synchronize()
            if rows in seen:
                late.append(time.perf_counter() - start)
            seen.add(rows)
            same(got, plain.generate(tokens, max_new_tokens=new, do_sample=False))
        assert {report.batch for report in fast.graphs} == seen
    assert max(late) < LATE_S


def test_a_processor_that_disagrees_on_the_stream_of_the_user() -> None:
    plain, model = on_gpu("Llama"), on_gpu("Llama")

    def process(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] % 4 == 0:
            scores = scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf)
        return scores

    options: dict[str, Any] = {"logits_processor": LogitsProcessorList([process]), "max_new_tokens": 40}
    with accelerated(model) as fast, torch.cuda.stream(torch.cuda.Stream()):
        tokens = prompt(3).cuda()
        for _ in range(5):
            got = model.generate(tokens, do_sample=False, **options)
            same(got, plain.generate(tokens, do_sample=False, **options))
        assert fast.num_ahead[1] > 0


def test_memory_is_that_of_the_default_and_the_graphs() -> None:
    model = on_gpu("Llama").to(torch.bfloat16)
    tokens = torch.randint(1, 97, (8, 400), device="cuda")

    def peak() -> int:
        """Of torch's memory; other processes may use the GPU too."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.generate(tokens, max_new_tokens=100, do_sample=False)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    wanted = peak()
    with accelerated(model, max_length=512) as fast:
        got = peak()
        graphs = sum(max(report.pool_bytes, report.device_bytes) for report in fast.graphs)
        assert fast.kv_cache is not None
        got += fast.kv_cache.stats().peak_physical_bytes
    assert wanted > 0
    assert got <= wanted + graphs + (128 << 20)


def test_a_forward_that_cannot_be_captured_goes_on_by_itself() -> None:
    plain, model = on_gpu("Llama"), on_gpu("Llama")

    for each in (plain, model):
        layer = each.model.layers[1].mlp
        own = layer.forward

        def waits(x: torch.Tensor, own: Any = own) -> torch.Tensor:
            return own(x) * (1.0 if x.sum().item() > -1e30 else 0.5)

        layer.forward = waits
    tokens = prompt(2).cuda()
    with accelerate(model, 64) as fast:
        with pytest.warns(UserWarning, match="captur"):
            got = model.generate(tokens, max_new_tokens=6, do_sample=False)
        assert got.tolist() == plain.generate(tokens, max_new_tokens=6, do_sample=False).tolist()
        assert fast.reasons
