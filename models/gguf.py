"""Weights from a GGUF file, the format of llama.cpp, dequantised on the way in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vattn.errors import ConfigError

from .config import LlamaConfig
from .llama import Llama
from .weights import build

__all__ = ["load_file"]

# GGUF name -> Hugging Face name; the blocks' names are completed with their layer index.
_OUTER = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"


def load_file(path: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model in a GGUF file.

    Raises:
        ConfigError: not a GGUF file, another architecture, an unknown quantisation, tensors that do not fit.
    """
    reader = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.")  # a hundred thousand strings that nobody asks for here
    }
    if metadata.get("split.count", 1) > 1:
        raise ConfigError(f"{path}: GGUF files split in several parts are not supported")
    embedding = tensors.get("token_embd.weight")
    divisors = tensors.pop(_ROPE_DIVISORS, None)
    config = LlamaConfig.from_gguf(
        metadata,
        vocab_size=1 if embedding is None else int(embedding.shape[1]),  # its absence is reported with the others'
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        rope_divisors=None if divisors is None else tuple(_dequantize(divisors).tolist()),
    )
    return build(config, _tensors(tensors, config), device=device, dtype=dtype, source=str(path))


def hf_name(gguf_name: str) -> str | None:
    """Hugging Face's name of a llama tensor without ``model.``, or None when it is not one.

    ``blk.3.attn_q.weight`` -> ``layers.3.self_attn.q_proj.weight``
    """
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name):
        layer, part, kind = match.groups()
        return f"layers.{layer}.{_BLOCK[part]}.{kind}" if part in _BLOCK else None
    part, _, kind = gguf_name.partition(".")
    return f"{_OUTER[part]}.{kind}" if part in _OUTER else None


def unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of Q and K rows, ``[num_heads * head_dim, ...]``.

    GGUF keeps the two halves of a rotary pair beside each other (0, 1, 2, …), Hugging Face half a head apart
    (0, D/2, 1, …).
    """
    pairs = tensor.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("reading GGUF files needs the package gguf: pip install 'vattn[hf]'") from error
    try:
        return GGUFReader(str(path))
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"cannot read {path} as a GGUF file: {error}") from error


def _tensors(tensors: dict[str, Any], config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    for gguf_name, raw in tensors.items():
        tensor = _dequantize(raw)
        if ".attn_q." in gguf_name:
            tensor = unpermute(tensor, config.num_heads)
        elif ".attn_k." in gguf_name:
            tensor = unpermute(tensor, config.num_kv_heads)
        yield hf_name(gguf_name) or gguf_name, tensor


def _dequantize(raw: Any) -> torch.Tensor:
    from gguf import quants

    try:
        array = quants.dequantize(raw.data, raw.tensor_type)
    except NotImplementedError as error:
        raise ConfigError(f"{raw.name}: {error}") from error
    return torch.tensor(array)  # a copy: plain float32 would otherwise stay a view of the read-only file
