"""``VirtualCache`` on a GPU: bfloat16 against float32, by teacher forcing and by generation."""

from __future__ import annotations

import copy
import os
from functools import cache

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import MODELS, make_model, prompt, with_cache  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from vattn import ConfigError  # noqa: E402
from vattn.attention import backends  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASES = ["Llama", "Mistral, window 16", "Qwen3", "Gemma 2", "Gemma 3", "GPT-OSS", "StableLM", "DeepSeek-V3", "GPT-NeoX"]
LENGTH = 56 if os.environ.get("VATTN_SHORT") else 90  # under compute-sanitizer


@torch.no_grad()
def forced(model, past, mask):
    """Logits of a fixed text: a prompt, a second chunk, then a token at a time."""
    tokens = prompt(3, length=LENGTH).to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    parts = []
    for start, end in ((0, 33), (33, 50), *((i, i + 1) for i in range(50, LENGTH))):
        out = model(
            tokens[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            **with_cache(past),
        )
        parts.append(out.logits.float())
    return torch.cat(parts, dim=1)


def padding(padded: bool) -> torch.Tensor:
    mask = torch.ones(3, LENGTH, dtype=torch.long, device=DEVICE)
    if padded:
        mask[0, :40], mask[2, :5] = 0, 0
    return mask


@cache
def with_default_cache(name: str, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float32 and in bfloat16."""
    mask = padding(padded)
    model = make_model(name).to(DEVICE)
    exact = forced(model, DynamicCache(config=model.config), mask)
    model = model.to(torch.bfloat16)
    return exact, forced(model, DynamicCache(config=model.config), mask)


@pytest.mark.parametrize("attention", ["auto", None, "torch-varlen", "flash-attn-2"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_good_as_eager(name, attention, padded):
    """Teacher-forced logits within twice the error of the default cache's, both against float32."""
    if attention == "flash-attn-2":
        backend = next(each for each in backends() if each.name == attention)
        if reason := backend.supports(torch.device(DEVICE), torch.bfloat16, 64):
            pytest.skip(reason)
    mask = padding(padded)
    seen = mask.bool()[:, :, None]
    exact, eager = (logits * seen for logits in with_default_cache(name, padded))
    model = make_model(name).to(DEVICE, torch.bfloat16)
    try:
        with VirtualCache(model.config, max_length=LENGTH, attention=attention) as past:
            got = forced(model, past, mask) * seen
            past.kv_cache.check_integrity()
    except ConfigError as error:
        if attention in ("auto", None):
            raise
        pytest.skip(str(error))
    assert got.isfinite().all()
    error, allowed = (got - exact).abs(), (eager - exact).abs()
    assert error.max() <= 2 * allowed.max()
    assert error.mean() <= 1.5 * allowed.mean()
    top = exact.topk(2).values
    clear = (top[..., 0] - top[..., 1] > 2 * allowed.max()) & mask.bool()
    assert torch.equal(got.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Qwen3-Next"])
def test_float32_generates_the_same(name):
    model = make_model(name).to(DEVICE)
    wanted = model.generate(prompt(3).to(DEVICE), max_new_tokens=20, do_sample=False)
    with VirtualCache(model.config, max_length=64) as past:
        got = model.generate(prompt(3).to(DEVICE), max_new_tokens=20, do_sample=False, **with_cache(past))
        past.kv_cache.check_integrity()
        assert past.stats().row_bytes > 0
    assert torch.equal(got, wanted)


def test_beams_and_prompt_lookup_in_bfloat16():
    model = make_model("Llama").to(DEVICE, torch.bfloat16)
    for tokens, options in ((prompt(2), {"num_beams": 3}), (prompt(1), {"prompt_lookup_num_tokens": 4})):
        with VirtualCache(model.config, max_length=128) as past:
            out = model.generate(tokens.to(DEVICE), max_new_tokens=30, do_sample=False, **with_cache(past), **options)
            past.kv_cache.check_integrity()
        assert out.shape[1] == tokens.shape[1] + 30


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "regroup"])
def test_copied_on_one_stream_and_read_on_another(how):
    model, rows = make_model("Llama").to(DEVICE), torch.tensor([1, 0])
    text, new = prompt(2).to(DEVICE), prompt(2, seed=2)[:, :1].to(DEVICE)
    default = DynamicCache(config=model.config)
    model(text, **with_cache(default))
    if how == "regroup":
        default.batch_select_indices(rows.to(DEVICE))
    wanted = model(new, **with_cache(default)).logits
    side = torch.cuda.Stream()
    with VirtualCache(model.config, max_length=64) as past:
        model(text, **with_cache(past))
        with torch.cuda.stream(side):
            torch.cuda._sleep(400_000_000)  # a fifth of a second
            if how == "regroup":
                past.batch_select_indices(rows)
                other = past
            else:
                other = copy.deepcopy(past)
        with other:
            torch.testing.assert_close(model(new, **with_cache(other)).logits, wanted, rtol=1e-3, atol=1e-3)
