"""Small Llama models, in transformers and in vattn with the same weights, and a folder of one with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vattn.attention import AttentionBackend, AttentionBatch, get
from vattn.kv_cache import KVCache
from vattn.models.config import LlamaConfig
from vattn.models.llama import Llama

# name -> what differs from the common small shape
SHAPES: dict[str, dict[str, object]] = {
    "3 KV heads": {"hidden_size": 90, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16},
    "head_dim 80": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80, "hidden_size": 96},
    "5 layers, one KV head, tied": {"num_hidden_layers": 5, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}

# SmolLM2-135M, for generation with random weights
SMOLLM2_SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)

# Nothing about it is a power of two
ODD_SHAPE = LlamaConfig(
    vocab_size=5000,
    hidden_size=600,
    intermediate_size=1000,
    num_layers=5,
    num_heads=9,
    num_kv_heads=3,
    head_dim=80,
    max_position_embeddings=3000,
)

LLAMA_3_1_8B_SHAPE = LlamaConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
)

SMALL = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)


def small_model(seed: int = 0) -> Llama:
    """``SMALL`` with weights large enough that its logits differ clearly between tokens and between contexts."""
    return Llama.random(SMALL, seed=seed, std=0.3)


def hf_llama(seed: int = 0, **changes: object):  # type: ignore[no-untyped-def]
    """A ``LlamaForCausalLM`` with random weights in float32; skips the test where there is no transformers."""
    return hf_model_of("llama", seed, **changes)


def hf_model_of(model_type: str, seed: int = 0, **changes: object):  # type: ignore[no-untyped-def]
    """transformers' own model of an architecture, small, with random weights in float32."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 200,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, or a forgotten one would not show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def same_in_vattn(hf_model) -> Llama:  # type: ignore[no-untyped-def]
    """The same weights in a ``vattn.models.Llama``."""
    from vattn.models.weights import Stored, build

    config = LlamaConfig.from_hf(json.loads(hf_model.config.to_json_string(use_diff=False)))
    weights = {
        name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in hf_model.state_dict().items()
    }
    return build(config, weights, device=torch.device("cpu"), dtype=torch.float32, source="test")


def open_cache(
    model: Llama,
    max_slots: int = 8,
    order: str = "token",
    max_seq_len: int | None = None,
    attention: AttentionBackend | None = None,
) -> KVCache:
    """A cache on the model's device with the margin of ``attention``.

    Its pages are small on the CPU, so that a few dozen tokens cross page boundaries.
    """
    return KVCache(
        model.kv_layout(max_seq_len, order=order),
        max_slots,
        model.device,
        page_bytes=4096 if model.device.type == "cpu" else None,
        over_read_tokens=attention.over_read_tokens if attention else 0,
        over_read_masked=attention.masks_over_read if attention else False,
    )


def run(
    model: Llama,
    cache: KVCache,
    slots: Sequence[int],
    chunks: Sequence[Sequence[int]],
    *,
    attention: str | AttentionBackend = "sdpa",
    all_logits: bool = False,
) -> torch.Tensor:
    """Append one chunk of tokens to each slot and return the logits on the host."""
    lengths = [cache.seq_len(slot) + len(chunk) for slot, chunk in zip(slots, chunks, strict=True)]
    cache.ensure_batch(slots, lengths)
    batch = AttentionBatch.build(slots, [len(chunk) for chunk in chunks], lengths, cache.device)
    tokens = torch.tensor([token for chunk in chunks for token in chunk], device=cache.device)
    backend = get(attention) if isinstance(attention, str) else attention
    with cache.step(slots), torch.inference_mode():
        return model(tokens, batch, cache, backend, all_logits=all_logits).cpu()


def random_tokens(num_tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


def save_folder(folder: Path, *, chat: bool = True, max_position_embeddings: int = 512) -> Path:
    """A tiny model with a word-level tokenizer, saved the way transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        model_max_length=max_position_embeddings,  # longer texts make transformers warn
    )
    fast.add_special_tokens({"additional_special_tokens": specials[1:]})
    if chat:
        fast.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    fast.save_pretrained(folder)
    hf_llama(vocab_size=len(fast), max_position_embeddings=max_position_embeddings).save_pretrained(folder)
    return folder
