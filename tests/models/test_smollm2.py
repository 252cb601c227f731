"""A real model: SmolLM2-135M-Instruct over mapped pages against what transformers generates."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from vattn.engine import Engine, Request
from vattn.errors import ConfigError
from vattn.kv_cache import KVCache
from vattn.models.llama import Llama
from vattn.models.loader import find, load_model, load_tokenizer
from vattn.models.tokenizer import Tokenizer


def _missing() -> str | None:
    """Why these tests cannot run; with VATTN_REQUIRE_MODEL set they fail instead of being skipped."""
    if os.environ.get("VATTN_REQUIRE_MODEL"):
        return None
    for module in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
    try:
        find("smollm2")
    except ConfigError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))

QUESTIONS = [
    "Hi!",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List five animals that live in the forest, one per line, with one fact about each of them.",
    "Translate to French: the cat sleeps on the table.",
    "Summarise this: " + "The quick brown fox jumps over the lazy dog while the farmer watches from the barn. " * 12,
    "Continue the story. " + "Once upon a time there was a small village at the edge of a large forest. " * 30,
]


@pytest.fixture(scope="module")
def model() -> Llama:
    return load_model(find("smollm2"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find("smollm2"))


@pytest.fixture(scope="module")
def hf_model() -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    path = find("smollm2")
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module", params=[16, pytest.param(64, marks=pytest.mark.slow)])
def num_new_tokens(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer, num_new_tokens: int) -> list[list[int]]:
    """Of different lengths, the last two of eight or the last of five long."""
    questions = QUESTIONS if num_new_tokens == 64 else [*QUESTIONS[:4], QUESTIONS[6]]
    encoded = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
    assert len({len(tokens) for tokens in encoded}) == len(questions)
    return encoded


@pytest.fixture(scope="module")
def expected(hf_model: Any, tokenizer: Tokenizer, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
    """What transformers generates greedily, one prompt at a time."""
    stop_tokens = sorted(tokenizer.stop_tokens)
    generated = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            output = hf_model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_new_tokens,
                do_sample=False,
                eos_token_id=stop_tokens,
                pad_token_id=stop_tokens[0],
            )
        generated.append(output[0, len(prompt) :].tolist())
    return generated


def test_weights_equal_transformers(model: Llama, hf_model: Any) -> None:
    expected = {name.removeprefix("model."): tensor for name, tensor in hf_model.state_dict().items()}
    tied = expected.pop("lm_head.weight", None)
    assert tied is None or torch.equal(tied, expected["embed_tokens.weight"])
    ours = model.state_dict()
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def test_end_of_turn(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.encode("<|im_end|>")) <= tokenizer.stop_tokens


@pytest.mark.parametrize("order", ["token", "layer"])
def test_token_for_token_what_transformers_generates(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    expected: list[list[int]],
    num_new_tokens: int,
    order: str,
) -> None:
    """All prompts in one batch, float32, greedy, on pages of the host driver."""
    requests = [Request(prompt, num_new_tokens, stop_tokens=tokenizer.stop_tokens) for prompt in prompts]
    with KVCache(model.kv_layout(order=order), max_slots=len(requests) + 1, device="cpu") as cache:
        with Engine(model, cache) as engine:
            completions = engine.generate(requests)
            assert engine.stats().num_preemptions == 0
        cache.check_integrity()
    assert [list(completion.tokens) for completion in completions] == expected
    assert "Paris" in tokenizer.decode(completions[1].tokens)


def test_a_virtual_cache_generates_the_same(
    hf_model: Any, prompts: list[list[int]], expected: list[list[int]], num_new_tokens: int
) -> None:
    """The drop-in with real weights: two prompts alone, and short ones left-padded in one batch."""
    from helpers.hf_models import with_cache

    from vattn.hf import VirtualCache

    count = min(num_new_tokens, 40)
    pairs = [(prompt, wanted[:count]) for prompt, wanted in zip(prompts, expected, strict=True)][:-2]
    longest = max(len(prompt) for prompt, _ in pairs)
    with VirtualCache(hf_model.config, max_length=longest + count) as past:
        for batch in ([pairs[0]], [pairs[-1]], pairs):
            width = max(len(prompt) for prompt, _ in batch)
            rows = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            out = hf_model.generate(
                rows,
                attention_mask=mask,
                **with_cache(past),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            for row, (_, wanted) in zip(out[:, width:].tolist(), batch, strict=True):
                assert row[: len(wanted)] == wanted
            assert past.kv_cache is not None
            past.kv_cache.check_integrity()
            past.reset()
