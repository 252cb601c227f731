"""``VirtualCache`` against transformers' default cache, token for token: every model, every way to generate."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import (  # noqa: E402
    ALWAYS,
    CACHE,
    MAX_LENGTH,
    MODELS,
    MODES,
    MOVED,
    NEW_TOKENS,
    OWN_ATTENTION,
    PASSED_ON,
    REFUSED,
    make_model,
    run,
    table,
)

from vattn.hf import VirtualCache, attention  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "huggingface.md"


@cache
def model_of(name):
    return make_model(name)


@cache
def expected(name, mode):
    """Tokens with the default cache; every row of them diverse, so that a wrong one would show."""
    model = model_of(name)
    tokens = run(model, mode, transformers.DynamicCache(config=model.config))
    for row in tokens[:, -NEW_TOKENS:].tolist():
        assert len(set(row)) >= 4, f"{name}, {mode}: {row} says little"
    return tokens


CASES = [(name, mode) for name in MODELS for mode in MODES]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(*case, marks=() if case[0] in ALWAYS or case[1] in ("dense", "left-padded") else pytest.mark.slow)
        for case in CASES
        if case not in REFUSED
    ],
)
def test_token_for_token(name, mode, monkeypatch):
    model, wanted = model_of(name), expected(name, mode)
    before = model.config._attn_implementation
    computed, attend = [], attention._attend

    def counted(*args):
        out = attend(*args)
        computed.append(out is not None)
        return out

    monkeypatch.setattr(attention, "_attend", counted)
    with VirtualCache(model.config, max_length=MAX_LENGTH, device="cpu", page_bytes=4096) as past:
        assert torch.equal(run(model, mode, past), wanted)
        past.kv_cache.check_integrity()
        assert past.stats().row_bytes > 0
    if name not in MOVED or CACHE == "cache":  # else a transformers of before the move, or of around it
        assert any(computed) == (name not in OWN_ATTENTION | PASSED_ON)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Llama", "Mistral, window 16", "GPT-OSS"])
def test_token_for_token_with_the_models_own_attention(name, mode):
    model, wanted = model_of(name), expected(name, mode)
    with VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=4096, attention=None) as past:
        assert model.config._attn_implementation in ("sdpa", "eager")
        assert torch.equal(run(model, mode, past), wanted)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_by_the_default_cache_too(case):
    name, mode = case
    model = model_of(name)
    for past in (transformers.DynamicCache(config=model.config), VirtualCache(model.config, max_length=MAX_LENGTH)):
        with pytest.raises(ValueError, match="not supported"):
            run(model, mode, past)


def test_the_table_in_the_docs():
    """Made by ``python tests/helpers/hf_models.py``."""
    found = re.search(r"<!-- combinations -->\n(.*?)\n<!-- end -->", DOCS.read_text(), re.DOTALL)
    assert found
    assert found[1] == table()
