"""Mistral, Qwen2 and Qwen3 against transformers' own models: windows, biases, normalised heads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llama import hf_llama, hf_model_of, open_cache, random_tokens, run, same_in_vattn

from vattn.engine import Engine, Request
from vattn.errors import ConfigError
from vattn.kv_cache import KVCache
from vattn.models.config import LlamaConfig
from vattn.models.llama import Llama
from vattn.models.loader import find, load_model

pytest.importorskip("transformers")

NUM_TOKENS = 70
# name -> (architecture, what differs from the common small shape); windows are smaller than the text
FAMILY: dict[str, tuple[str, dict[str, object]]] = {
    "mistral": ("mistral", {"sliding_window": 16}),
    "mistral, window of 1": ("mistral", {"sliding_window": 1}),
    "mistral without window": ("mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases, windows, tied": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.mark.parametrize("order", ["token", "layer"])
@pytest.mark.parametrize("member", list(FAMILY))
def test_logits_equal_transformers(member: str, order: str) -> None:
    """A whole prompt, the prompt in chunks longer and shorter than the window, and token by token."""
    model_type, changes = FAMILY[member]
    hf_model = hf_model_of(model_type, **changes)
    tokens = random_tokens(NUM_TOKENS, hf_model.config.vocab_size)
    with torch.no_grad():
        expected = hf_model(torch.tensor([tokens])).logits[0]
    model = same_in_vattn(hf_model)
    with open_cache(model, order=order) as cache:
        for attention, sizes in (("sdpa", [70]), ("sdpa", [7, 1, 40, 22]), ("reference", [33, 37]), ("sdpa", [1] * 70)):
            slot = cache.acquire()
            parts = torch.tensor(tokens).split(sizes)
            got = [run(model, cache, [slot], [p.tolist()], attention=attention, all_logits=True) for p in parts]
            torch.testing.assert_close(torch.cat(got), expected, rtol=2e-4, atol=5e-5)
            cache.check_integrity()


@pytest.mark.parametrize("member", ["mistral", "qwen2 with windows", "qwen3, biases, windows, tied"])
def test_a_saved_folder(tmp_path: Path, member: str) -> None:
    """As transformers 5 writes ``config.json``, and as 4 wrote it: without layer_types, rope_theta outside."""
    model_type, changes = FAMILY[member]
    hf_model = hf_model_of(model_type, **changes)
    hf_model.save_pretrained(tmp_path)
    tokens = random_tokens(40, hf_model.config.vocab_size)
    with torch.no_grad():
        expected = hf_model(torch.tensor([tokens])).logits[0]
    for version in (5, 4):
        if version == 4:
            config = json.loads((tmp_path / "config.json").read_text())
            config.pop("layer_types", None)
            config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
            (tmp_path / "config.json").write_text(json.dumps(config))
        model = load_model(find(tmp_path))
        with open_cache(model) as cache:
            got = run(model, cache, [cache.acquire()], [tokens], all_logits=True)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=5e-5)


def test_the_engine_prefills_windows_in_chunks() -> None:
    """Greedy tokens do not depend on how a prompt longer than the window is cut, nor on the batch."""
    config = LlamaConfig(128, 32, 48, 3, 4, 2, 8, max_position_embeddings=256, windows=(None, 12, 5))
    model = Llama.random(config, std=0.3)
    wanted = [Request(random_tokens(n, 128, seed=n), 12) for n in (61, 3, 40)]
    tokens = []
    for max_step_tokens in (2048, 16, 7):
        with KVCache(model.kv_layout(), 4, "cpu", memory_limit=2**24, page_bytes=4096) as cache:
            with Engine(model, cache, max_step_tokens=max_step_tokens) as engine:
                tokens.append([completion.tokens for completion in engine.generate(wanted)])
            cache.check_integrity()
    assert tokens[0] == tokens[1] == tokens[2]
    unlimited = Llama.random(LlamaConfig(**{**vars(config), "windows": None}), std=0.3)
    with Engine(unlimited, memory_limit=2**24) as engine:
        assert [c.tokens for c in engine.generate(wanted)] != tokens[0]


def test_layers_with_one_window_share_a_group() -> None:
    config = LlamaConfig(8, 8, 8, 4, 2, 1, 4, windows=(None, 7, None, 7))
    with torch.device("meta"):
        layout = Llama(config).kv_layout()
    assert [(group.layers, group.window) for group in layout.groups] == [((0, 2), None), ((1, 3), 7)]
    assert layout.bytes_per_token == 4 * 2 * 4 * 4


def mistral_7b(**changes: object) -> dict[str, Any]:
    """``config.json`` of Mistral-7B-v0.1, as transformers 4 wrote it."""
    return {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
        **changes,
    }


def test_published_configs() -> None:
    assert LlamaConfig.from_hf(mistral_7b()).windows == (4096,) * 32
    assert LlamaConfig.from_hf(mistral_7b(sliding_window=None)).windows is None
    qwen = mistral_7b(model_type="qwen2", use_sliding_window=False, max_window_layers=28)
    config = LlamaConfig.from_hf(qwen)
    assert (config.windows, config.attention_bias, config.attention_output_bias) == (None, True, False)
    assert LlamaConfig.from_hf({**qwen, "use_sliding_window": True}).windows == (None,) * 28 + (4096,) * 4
    assert LlamaConfig.from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 40}).windows is None
    qwen3 = LlamaConfig.from_hf(mistral_7b(model_type="qwen3"))
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.attention_bias, qwen3.windows) == (True, 128, False, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts .num_local_experts.*supported: llama"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "soft-capped attention"),
        ({"model_type": "phi3"}, "unknown architecture .*supported: llama, mistral, qwen2, qwen3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "different ones for full_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"sliding_window": 0}, "sliding_window must be an integer from 1"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 32},
            "layer_types",
        ),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_hf(mistral_7b(**change))


@pytest.mark.parametrize("windows", [(None, 4), (None, 0, 4), (None, 4, 2.5)])
def test_impossible_windows(windows: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="window"):
        LlamaConfig(8, 8, 8, 3, 2, 1, 4, windows=windows)


def test_llama_ignores_keys_of_its_cousins() -> None:
    """Some Llama checkpoints carry them; transformers' Llama does not look at them either."""
    hf_model = hf_llama()
    config = json.loads(hf_model.config.to_json_string(use_diff=False))
    assert LlamaConfig.from_hf({**config, "sliding_window": 8, "use_sliding_window": True}).windows is None
