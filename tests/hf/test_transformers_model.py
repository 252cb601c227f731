"""Engines over models of transformers: the tokens of many prompts together are those of ``generate`` one by one."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_families import MODELS, MORE  # noqa: E402
from helpers.hf_models import CACHE, MOVED, make_model, prompt  # noqa: E402

from vattn import ConfigError, Engine, KVCache, Request  # noqa: E402
from vattn.hf import TransformersModel  # noqa: E402

NEW_TOKENS = 24
PROMPTS = [prompt(1, seed=seed, length=length)[0].tolist() for seed, length in enumerate((11, 3, 30, 1, 17))]
# Decoders that the runtime refuses, and why.
REFUSED = {
    **dict.fromkeys(("Falcon", "Falcon, ALiBi"), "computes attention by itself"),
    "MPT": "takes no position_ids",
    "Qwen3-Next": "keeps a recurrent state",
}
CHANGES = {"Llama 4, chunks": {"attention_chunk_size": 64}}  # a text ends with its first chunk


# What models differ in; the others are tried where slow tests are run.
ALWAYS = {
    *("Llama", "Mistral, window 16", "Gemma 2", "Gemma 3", "Gemma 4, shared K and V", "GPT-OSS", "Qwen3-MoE", "GPT-2"),
    *("DiffLlama", "DeepSeek-V3", "Llama 4, chunks", "OPT", "Phi-3, longrope", "Llama, dynamic NTK"),
}


def known(name):
    kind = {**MODELS, **MORE}[name][0]
    marks = [pytest.mark.skipif(not hasattr(transformers, kind), reason=f"there is no {kind} in this version")]
    return pytest.param(name, marks=marks if name in ALWAYS else [*marks, pytest.mark.slow])


def alone(model, prompts=PROMPTS, new=NEW_TOKENS):
    """Greedy tokens of each, by transformers."""
    return [
        model.generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False)[0, len(tokens) :].tolist()
        for tokens in prompts
    ]


def together(engine, prompts=PROMPTS, new=NEW_TOKENS):
    completions = engine.generate([Request(tokens, max_new_tokens=new) for tokens in prompts])
    engine.cache.check_integrity()
    return [list(completion.tokens) for completion in completions]


@pytest.mark.parametrize("name", [known(name) for name in (*MODELS, *MORE) if name not in REFUSED])
def test_every_family(name):
    """Prompts of many lengths, whole and in parts, beside steps that decode, and with too little memory for all."""
    model = make_model(name, **CHANGES.get(name, {}))
    if name in MOVED and CACHE != "cache":
        with pytest.raises(ConfigError, match="computes attention by itself"):
            TransformersModel(model)
        return
    wanted = alone(model)
    assert len({token for tokens in wanted for token in tokens}) > 8, "these tokens say little"
    with TransformersModel(model, fuse=True) as ours:
        cache_of = {"max_slots": 5, "device": "cpu", "page_bytes": 4096}
        with KVCache(ours.kv_layout(), **cache_of) as cache, Engine(ours, cache, max_step_tokens=7) as engine:
            assert together(engine) == wanted
            most = cache.stats().peak_physical_bytes
        scarce = KVCache(ours.kv_layout(), **cache_of, memory_limit=most // 2 // 4096 * 4096)
        with scarce, Engine(ours, scarce) as engine:
            engine._scheduler._share = 0.1  # it expects answers to be short, and takes in more than fits
            assert together(engine) == wanted
            assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name):
    model = make_model(name)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=REFUSED[name]):
        TransformersModel(model)
    assert model.config._attn_implementation == before
