"""Weights from a GGUF file, the format of llama.cpp, dequantised on the way in."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .config import LlamaConfig
from .fields import lacks_package
from .gguf_file import GGUFFile, StoredTensor, open_file
from .llama import Llama
from .weights import Stored, build

__all__ = ["check_file", "config_of", "load_file"]

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


def check_file(path: Path) -> GGUFFile:
    """Its header, after a look whether all that it names lies within the file.

    Raises:
        ConfigError: not a GGUF file, a broken one, or one of several parts.
    """
    try:
        import gguf  # noqa: F401 - for its tables of types
    except ImportError as error:
        raise lacks_package("reading GGUF files needs", "gguf") from error
    file = open_file(path)
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(f"{path}: GGUF files split in several parts are not supported")
    return file


def config_of(file: GGUFFile) -> LlamaConfig:
    """The model's shape, of the file's metadata and of what tensors there are; ConfigError for another architecture."""
    embedding, divisors = file.tensors.get("token_embd.weight"), file.tensors.get(_ROPE_DIVISORS)
    return LlamaConfig.from_gguf(
        file.metadata,
        vocab_size=1 if embedding is None else embedding.shape[0],  # its absence is reported with the others'
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        rope_divisors=None if divisors is None else tuple(_dequantize(divisors).flatten().tolist()),
    )


def load_file(path: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model in a GGUF file.

    Raises:
        ConfigError: not a GGUF file, another architecture, an unknown quantisation, tensors that do not fit.
    """
    file = check_file(path)
    config = config_of(file)
    tensors = {name: tensor for name, tensor in file.tensors.items() if name != _ROPE_DIVISORS}
    stored = {
        hf_name(name) or name: Stored(tensor.shape, partial(_read, tensor, config)) for name, tensor in tensors.items()
    }
    if len(stored) < len(tensors):
        raise ConfigError(f"{path}: two tensors stand for the same weights")
    return build(config, stored, device=device, dtype=dtype, source=str(path))


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


def _read(stored: StoredTensor, config: LlamaConfig) -> torch.Tensor:
    tensor = _dequantize(stored)
    if ".attn_q." in stored.name:
        return unpermute(tensor, config.num_heads)
    if ".attn_k." in stored.name:
        return unpermute(tensor, config.num_kv_heads)
    return tensor


def _dequantize(stored: StoredTensor) -> torch.Tensor:
    from gguf import quants

    try:
        array = quants.dequantize(stored.data, stored.type)
    except NotImplementedError as error:
        raise ConfigError(f"{escaped(stored.name)}: {error}") from error
    return torch.tensor(array)  # a copy: plain float32 would otherwise stay a view of the read-only file
