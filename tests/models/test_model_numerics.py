"""Whole models in bfloat16 on the GPU, on every attention backend present: as exact as eager, and end to end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers.llama import LLAMA_3_1_8B_SHAPE, ODD_SHAPE, SMOLLM2_SHAPE, open_cache, random_tokens, run

from vattn.attention import AttentionBackend, backends, choose, get
from vattn.driver.cuda import unavailable
from vattn.engine import Engine, Request
from vattn.models.config import LlamaConfig
from vattn.models.llama import Llama

pytestmark = pytest.mark.gpu

STEPS = 6 if os.environ.get("VATTN_SHORT") else 40  # under compute-sanitizer
# Two texts, and where each is cut: prefill, a chunk beside a single token, then token by token.
CUTS = ((200, 260, *range(261, 261 + STEPS)), (101, 102, *range(103, 103 + STEPS)))
TEXT_LENS = tuple(cuts[-1] for cuts in CUTS)
SHAPES = {"smollm2": SMOLLM2_SHAPE, "odd": ODD_SHAPE}
# Larger than usual, so that the best token is often clearly the best although nothing was learnt.
STD = 0.05


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if reason := unavailable():
        pytest.skip(reason)


def usable(backend: AttentionBackend, head_dim: int) -> AttentionBackend:
    if reason := backend.supports(torch.device("cuda"), torch.bfloat16, head_dim):
        pytest.skip(f"{backend.name}: {reason}")
    return backend


def teacher_forced(model: Llama, texts: Sequence[Sequence[int]], attention: AttentionBackend) -> torch.Tensor:
    """The logits of every token of the texts, ``[num_tokens, vocab_size]`` float32, texts computed side by side."""
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    with open_cache(model, max_seq_len=512, attention=attention) as cache:
        slots = [cache.acquire() for _ in texts]
        starts = [0] * len(texts)
        for ends in zip(*CUTS, strict=True):
            chunks = [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)]
            logits = run(model, cache, slots, chunks, attention=attention, all_logits=True).float()
            for part, piece in zip(parts, logits.split([len(chunk) for chunk in chunks]), strict=True):
                part.append(piece)
            starts = list(ends)
        cache.check_integrity()
    return torch.cat([piece for part in parts for piece in part])


@pytest.fixture(scope="module", params=list(SHAPES))
def judged(request: pytest.FixtureRequest) -> tuple[Llama, list[list[int]], torch.Tensor, torch.Tensor]:
    """A bfloat16 model, texts, its logits with the weights in float32, and those of eager bfloat16."""
    if reason := unavailable():
        pytest.skip(reason)
    config: LlamaConfig = SHAPES[request.param]
    model = Llama.random(config, seed=3, device="cuda", dtype=torch.bfloat16, std=STD)
    texts = [random_tokens(n, config.vocab_size, seed=n) for n in TEXT_LENS]
    wide = Llama.random(config, seed=3, device="cuda")
    wide.load_state_dict(model.state_dict())
    exact = teacher_forced(wide, texts, get("reference"))
    # Attention written out with float32 inside: the most exact that bfloat16 weights and activations allow.
    eager = teacher_forced(model, texts, get("reference"))
    return model, texts, exact, eager


@pytest.mark.parametrize("name", [*(backend.name for backend in backends()), "chosen"])
def test_logits_within_twice_the_error_of_eager(
    judged: tuple[Llama, list[list[int]], torch.Tensor, torch.Tensor], name: str
) -> None:
    model, texts, exact, eager = judged
    head_dim = model.config.head_dim
    attention = choose("cuda", torch.bfloat16, head_dim) if name == "chosen" else usable(get(name), head_dim)
    logits = teacher_forced(model, texts, attention)
    assert logits.shape == (sum(TEXT_LENS), model.config.vocab_size)

    error, allowed = (logits - exact).abs(), (eager - exact).abs()
    print(f"{attention.name}: max error {error.max():.4f}, eager {allowed.max():.4f}")
    print(f"{attention.name}: rms error {rms(error):.5f}, eager {rms(allowed):.5f}")
    assert error.max() <= 2 * allowed.max()
    assert rms(error) <= 2 * rms(allowed)

    best = exact.topk(2).values
    decided = best[:, 0] - best[:, 1] > allowed.max()
    assert decided.float().mean() > 0.1  # or this would show nothing
    assert torch.equal(logits.argmax(-1)[decided], exact.argmax(-1)[decided])


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_an_odd_shape_end_to_end(backend: AttentionBackend) -> None:
    """3 KV heads, head_dim 80, 5 layers: more requests than slots, prompts in chunks."""
    usable(backend, ODD_SHAPE.head_dim)
    model = Llama.random(ODD_SHAPE, device="cuda", dtype=torch.bfloat16, std=STD)
    requests = [Request(random_tokens(n, 5000, seed=n), 30) for n in (1, 700, 64, 129, 2000, 17)]
    with open_cache(model, max_slots=5, attention=backend) as cache:
        with Engine(model, cache, max_step_tokens=512, attention=backend) as engine:
            completions = engine.generate(requests)
        assert [len(completion.tokens) for completion in completions] == [30] * len(requests)
        cache.check_integrity()
        assert cache.stats().num_live_slots == 0


# 8B, 16k ------------------------------------------------------------------------------------------------------------
CONTEXT, CHUNK, NUM_STEPS = 16384, 4096, 8


@pytest.fixture(scope="module")
def llama_8b() -> Iterator[Llama]:
    if reason := unavailable():
        pytest.skip(reason)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    model = Llama.random(LLAMA_3_1_8B_SHAPE, device="cuda", dtype=torch.bfloat16)
    yield model
    del model
    torch.cuda.empty_cache()


def prefill_and_decode(model: Llama, tokens: list[int], attention: AttentionBackend) -> torch.Tensor:
    """The logits after the prefill and after each decode step, ``[1 + NUM_STEPS, vocab_size]`` float32."""
    with open_cache(model, max_slots=2, attention=attention) as cache:
        slot = cache.acquire(1)
        logits = []
        starts = [*range(0, CONTEXT, CHUNK), *range(CONTEXT, CONTEXT + NUM_STEPS)]
        for start, end in zip(starts, [*starts[1:], CONTEXT + NUM_STEPS], strict=True):
            new = run(model, cache, [slot], [tokens[start:end]], attention=attention).float()
            if end >= CONTEXT:
                logits.append(new)
        cache.check_integrity()
    return torch.cat(logits)


@pytest.mark.unsanitized
def test_8b_at_16k_agrees_between_backends(llama_8b: Llama) -> None:
    """All that are present but the reference, whose scores of one chunk would be 8 GiB, against SDPA."""
    tokens = random_tokens(CONTEXT + NUM_STEPS, llama_8b.config.vocab_size)
    expected = prefill_and_decode(llama_8b, tokens, get("sdpa"))
    assert expected.shape == (1 + NUM_STEPS, llama_8b.config.vocab_size)
    assert expected.isfinite().all()
    differences: dict[str, float] = {}
    others = [b for b in backends() if b.name not in ("sdpa", "reference")]
    for attention in [*others, choose("cuda", torch.bfloat16, 128)]:
        if reason := attention.supports(torch.device("cuda"), torch.bfloat16, 128):
            print(f"{attention.name}: {reason}")
            continue
        logits = prefill_and_decode(llama_8b, tokens, attention)
        differences[attention.name] = (rms(logits - expected) / rms(expected)).item()
    print(f"differences, as a share of the logits' size: {differences}")
    assert max(differences.values(), default=0.0) < 0.05


def test_8b_at_16k_end_to_end(llama_8b: Llama) -> None:
    """Through the engine, on the backends chosen for this machine, beside a short request."""
    attention = choose("cuda", torch.bfloat16, 128)
    requests = [Request(random_tokens(n, 128256, seed=n), NUM_STEPS) for n in (CONTEXT - NUM_STEPS, 40)]
    with open_cache(llama_8b, max_slots=3, attention=attention) as cache:
        with Engine(llama_8b, cache, max_step_tokens=CHUNK) as engine:
            completions = engine.generate(requests)
            assert [len(completion.tokens) for completion in completions] == [NUM_STEPS] * 2
            assert engine.stats().num_prefill_tokens == CONTEXT - NUM_STEPS + 40 - 2
        stats = cache.stats()
        # Two sequences and the loop's own slot, each with the margin, in whole pages of 16 tokens.
        assert stats.peak_physical_bytes < (CONTEXT + 40 + 3 * (attention.over_read_tokens + 16)) * 131072
        cache.check_integrity()
