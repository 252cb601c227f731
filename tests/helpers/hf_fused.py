"""Families of transformers' models whose parts are fused, and what they give in passes."""

from __future__ import annotations

import torch

from helpers.hf_models import make_model, prompt
from vattn import Engine, KVCache, Request
from vattn.attention import AttentionBatch, DecodeBatch, get
from vattn.hf import TransformersModel

WHOLE = {"layer": 4, "attention": 4, "mlp": 4, "norm": 9, "output": 1}
SANDWICH = {**WHOLE, "norm": 17}
EXPERTS = {"layer": 4, "attention": 4, "experts": 4, "norm": 9, "output": 1}
# Family -> (changes of its config, what is fused of four layers).
FAMILIES = {
    "Llama": ({}, WHOLE),
    "Mistral, window 16": ({}, WHOLE),
    "Qwen2": ({}, WHOLE),
    "Qwen3": ({}, WHOLE),
    "Gemma 2": ({}, SANDWICH),
    "Gemma 3": ({}, SANDWICH),
    "Gemma": ({}, WHOLE),
    "Phi-3": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, WHOLE),
    "OLMo-2": ({}, WHOLE),
    "SmolLM3": ({}, WHOLE),  # some layers do not rotate
    "Granite": ({}, WHOLE),
    "Glm4": ({}, SANDWICH),  # pairs side by side, a part of them
    "Cohere2": ({}, {"attention": 4, "mlp": 4, "output": 1}),  # angles side by side; one norm, other than ours
    "GPT-OSS": ({}, {"layer": 4, "attention": 4, "norm": 9, "output": 1}),  # sinks; experts with biases
    "StableLM": ({}, {"attention": 4, "mlp": 4, "output": 1}),  # other norms
    "Qwen3-MoE": ({}, EXPERTS),
    "Mixtral": ({}, EXPERTS),
    "Olmoe": ({}, EXPERTS),
}
NEW_TOKENS, LENGTHS = 24, (11, 30, 1)


def make(name, **changes):
    return make_model(name, **{**FAMILIES.get(name, ({}, {}))[0], **changes})


def prompts():
    return [prompt(1, seed=i, length=length)[0].tolist() for i, length in enumerate(LENGTHS)]


@torch.inference_mode()
def forced(model, ops=None, fuse=True, steps=6, decode="reference"):
    """Logits of a fixed text after prompts of several lengths, by decode steps: ``[steps, batch, vocab]``."""
    texts = [prompt(1, seed=20 + i, length=length + steps)[0] for i, length in enumerate(LENGTHS)]
    logits, device = [], model.device
    page_bytes = 4096 if device.type == "cpu" else None
    with (
        TransformersModel(model, 128, ops, fuse=fuse) as made,
        KVCache(made.kv_layout(), 3, device, memory_limit=1 << 28, page_bytes=page_bytes) as cache,
    ):
        slots = [cache.acquire() for _ in texts][::-1]
        cache.ensure_batch(slots, [len(text) for text in texts])
        tokens = torch.cat([text[:-steps] for text in texts]).to(device)
        made.prefill(tokens, AttentionBatch.build(slots, LENGTHS, LENGTHS, device), cache, get("reference"))
        for step in range(steps):
            rows = torch.tensor(LENGTHS, dtype=torch.int32, device=device) + step
            new = torch.stack([text[step - steps] for text in texts]).int().to(device)
            batch = DecodeBatch(torch.tensor(slots, dtype=torch.int32, device=device), rows, rows + 1, 128, new)
            logits.append(made.decode(new, batch, cache, get(decode)).float())
        cache.check_integrity()
    return torch.stack(logits), made.report


def greedy(made):
    with Engine(made, memory_limit=64 << 20) as engine:
        return [list(done.tokens) for done in engine.generate([Request(each, NEW_TOKENS) for each in prompts()])]
