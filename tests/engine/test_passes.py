"""Passes of the engine: captured ones on a GPU, of fixed sizes, and prompts beside those who decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.engine import (
    alone,
    by_sample,
    cache_of,
    requests_of,
    run_out,
    tokens_of,
)
from helpers.llama import SMALL, random_tokens, small_model

from vattn import Engine, KVCache, Request, Sampling
from vattn.errors import ConfigError
from vattn.models import FusedLlama, Llama


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_same_tokens_on_the_gpu(model: Llama) -> None:
    wanted = [*requests_of(8), Request(random_tokens(50, 128), 20, Sampling(1.0, seed=7), n=3)]
    expected = [c.tokens for each in alone(model, wanted) for c in each]
    on_gpu = small_model().to("cuda")
    with KVCache(on_gpu.kv_layout(), 5, "cuda", 64 << 20) as cache, Engine(on_gpu, cache, max_step_tokens=16) as engine:
        assert tokens_of(engine.generate(wanted)) == expected
        cache.check_integrity()


@pytest.mark.gpu
def test_captured_passes_give_the_same_tokens() -> None:
    """A pass of each size is launched, then captured, then replayed; the tokens are those of the first time."""
    shape = replace(SMALL, num_heads=8, num_kv_heads=2, head_dim=64, max_position_embeddings=2048)
    model = Llama.random(shape, seed=0, std=0.1).to("cuda", torch.bfloat16)
    requests = [Request(random_tokens(n, 128, seed=n), 20, Sampling(0.7, seed=n)) for n in (700, 3, 90, 1, 260, 40)]
    with Engine(model, max_batch=8, max_step_tokens=256, memory_limit=256 << 20) as engine:
        rounds = [tokens_of(engine.generate(requests)) for _ in range(4)]
        held = engine._loop._step._graphs._by_key.values()
        assert any(isinstance(each, torch.cuda.CUDAGraph) for each in held)
        assert not any(each is False for each in held)
        assert rounds[1:] == rounds[:1] * 3
        engine.cache.check_integrity()
    with Engine(model, max_batch=8, max_step_tokens=256, memory_limit=256 << 20) as engine:
        engine.warm_up()
        held = dict(engine._loop._step._graphs._by_key)
        assert len(held) >= 10
        assert all(isinstance(each, torch.cuda.CUDAGraph) for each in held.values())
        assert tokens_of(engine.generate(requests)) == rounds[0]
        engine.warm_up()
        assert engine._loop._step._graphs._by_key == held
        assert tokens_of(engine.generate(requests)) == rounds[0]


@pytest.mark.gpu
def test_passes_that_cannot_be_captured_are_launched() -> None:
    """CUDA gives the first capture up; nothing else is captured, and torch's random numbers are as before."""

    class Waiting(FusedLlama):
        def prefill_and_decode(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
            assert tokens.sum().item() >= 0
            return super().prefill_and_decode(tokens, *others)

    shape = replace(SMALL, num_heads=8, num_kv_heads=2, head_dim=64, max_position_embeddings=2048)
    model = Llama.random(shape, seed=0, std=0.1).to("cuda", torch.bfloat16)
    requests = [Request(random_tokens(n, 128, seed=n), 20, Sampling(0.7, seed=n)) for n in (300, 3, 90)]
    with Engine(Waiting(model), max_batch=8, max_step_tokens=256, memory_limit=256 << 20) as engine:
        rounds = [tokens_of(engine.generate(requests)) for _ in range(3)]
        assert rounds[1:] == rounds[:1] * 2
        held = engine._loop._step._graphs._by_key.values()
        assert not any(isinstance(each, torch.cuda.CUDAGraph) for each in held)
        assert torch.rand(3, device="cuda").isfinite().all()
        engine.cache.check_integrity()


def test_warm_up_changes_nothing(model: Llama, cache: KVCache) -> None:
    wanted = requests_of(4)
    with Engine(model, cache) as engine:
        engine.warm_up()
        ids = [engine.submit(request) for request in wanted[:2]]
        tokens = engine.step()
        engine.warm_up()
        expected = [c.tokens for (c,) in alone(model, wanted)]
        assert [c.tokens for c in engine.generate(wanted[2:])] == expected[2:]
        found = by_sample(tokens + run_out(engine))
        assert [found[request_id, 0] for request_id in ids] == expected[:2]
    with pytest.raises(ConfigError, match="closed"):
        engine.warm_up()


def test_prompts_are_computed_in_the_passes_of_those_who_decode(model: Llama) -> None:
    """A token for who decodes in every step, and a part of the prompt; the more prompts wait, the larger."""
    sizes: list[int] = []

    class Counting(FusedLlama):
        def prefill_and_decode(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
            sizes.append(len(tokens))
            return super().prefill_and_decode(tokens, *others)

    request, late = Request([3, 5], 60), [Request(random_tokens(301, 128, seed=i), 4) for i in range(5)]
    expected = [c.tokens for (c,) in alone(model, [request, *late])]
    with cache_of(model, max_slots=8) as cache, Engine(Counting(model), cache) as engine:
        first = engine.submit(request)
        tokens = engine.step() + engine.step()
        ids = [engine.submit(late[0])]
        for i in range(5):
            new = engine.step()
            assert [token.request_id for token in new] == ([first] if i < 4 else [first, *ids])
            tokens += new
        # What a step may compute on the CPU while somebody decodes; the first prompt's row was computed before.
        assert sizes == [1] + [64] * 4 + [300 - 4 * 64]
        ids += [engine.submit(each) for each in late[1:]]
        tokens += run_out(engine)
        found = by_sample(tokens)
        assert [found[each, 0] for each in (first, *ids)] == expected
        assert 64 < max(sizes) <= 256  # while several wait for one or two who decode


@pytest.mark.parametrize(
    ("budget", "beside", "room"),
    [(1024, 16, 1008), (1024, 64, 960), (256, 5, 251), (16, 16, 16), (17, 16, 17), (128, 100, 128), (4096, 16, 4096)],
)
def test_prompt_tokens_fill_a_captured_pass(model: Llama, cache: KVCache, budget: int, beside: int, room: int) -> None:
    """With the rows that decode; there is one of 128 rows at least, and no pass of a few tokens for the sake of it."""
    with Engine(model, cache) as engine:
        assert engine._passes.room(budget, beside) == budget
        engine._passes._captures = True
        assert engine._passes.room(budget, beside) == room


def test_a_model_without_mixed_passes(model: Llama, cache: KVCache) -> None:
    """What rides is computed before the decode step, then."""

    class Plain(FusedLlama):
        prefill_and_decode = None  # type: ignore[assignment]

    wanted = requests_of(6, max_new_tokens=8)
    with Engine(Plain(model), cache, max_step_tokens=3) as engine:
        assert [c.tokens for c in engine.generate(wanted)] == [c.tokens for (c,) in alone(model, wanted)]
