"""Twelve forwards that were not written for capture: eight of transformers, with random weights, and four by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Forward:
    """``make(quick)`` gives a module and keyword arguments, on the CPU."""

    name: str
    make: Callable[[bool], tuple[nn.Module, dict[str, Any]]]


def _text(model: str, config: str, inputs: dict[str, Any], **sizes: Any) -> Callable[[bool], Any]:
    """A model of transformers that takes token ids. The second of two sizes is that of a quick run."""

    def make(quick: bool) -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        chosen = {name: size[quick] if isinstance(size, tuple) else size for name, size in sizes.items()}
        module = getattr(transformers, model)(getattr(transformers, config)(**chosen))
        ids = torch.randint(5, chosen.get("vocab_size", 1000), (1, 16 if quick else 128))
        given = {name: torch.ones_like(ids) if value == "ones" else value for name, value in inputs.items()}
        return module, {"input_ids": ids, **given}

    return make


def _image(model: str, config: str, **sizes: Any) -> Callable[[bool], Any]:
    def make(quick: bool) -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        chosen = {name: size[quick] if isinstance(size, tuple) else size for name, size in sizes.items()}
        module = getattr(transformers, model)(getattr(transformers, config)(**chosen))
        side = module.config.image_size
        return module, {"pixel_values": torch.randn(1, 3, side, side)}

    return make


# -- by hand ---------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), width // 64
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), narrow)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(x)


class HostMaskAndTable(nn.Module):
    """The mask stays on the CPU, as no buffer, and the table of positions is made there in each call."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.mask = torch.ones(1024, 1024, dtype=torch.bool).tril()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length, width = x.shape[-2:]
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        x = x + torch.cat([angles.sin(), angles.cos()], -1).to(x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, self.mask[:length, :length].to(x.device))
        return x


class Lengths(nn.Module):
    """Each sequence of a batch by itself, at its length, which ``.item()`` reads."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for row in range(len(x)):
            n = lengths[row].item()
            y = x[row : row + 1, :n]
            for layer in self.layers:
                y = layer(y)
            out[row : row + 1, :n] = y
        return out


class Unpadded(nn.Module):
    """Drops padding by a boolean mask ahead of the products, and puts the rows back afterwards."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width).mlp for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = x[mask]
        for layer in self.layers:
            rows = rows + layer(rows)
        out = torch.zeros_like(x)
        out[mask] = rows
        return out


class LoopedExperts(nn.Module):
    """A mixture of experts that runs each expert on the tokens that chose it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Block(width).mlp for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if token.numel():
                out.index_add_(0, token, expert(rows[token]) * weights[token, place, None])
        return out.view_as(x)


def _by_hand(build: Callable[[int, int], nn.Module], *more: str) -> Callable[[bool], Any]:
    def make(quick: bool) -> tuple[nn.Module, dict[str, Any]]:
        width, layers, length = (64, 2, 16) if quick else (768, 12, 128)
        given: dict[str, Any] = {"x": torch.randn(2, length, width)}
        if "lengths" in more:
            given["lengths"] = torch.tensor([length, length // 2])
        if "mask" in more:
            given["mask"] = torch.arange(length)[None] < torch.tensor([[length], [length // 2]])
        return build(width, layers), given

    return make


SIZES = {"hidden_size": (768, 64), "num_hidden_layers": (12, 2), "num_attention_heads": (12, 4)}
FORWARDS = [
    Forward(
        "llama",
        _text(
            *("LlamaForCausalLM", "LlamaConfig", {"use_cache": False}),
            hidden_size=(2048, 64),
            intermediate_size=(8192, 128),
            num_hidden_layers=(16, 2),
            num_attention_heads=(32, 4),
            num_key_value_heads=(8, 2),
            vocab_size=32000,
        ),
    ),
    Forward(
        "gpt2",
        _text(
            *("GPT2LMHeadModel", "GPT2Config", {"use_cache": False, "attention_mask": "ones"}),
            n_embd=(768, 64),
            n_layer=(12, 2),
            n_head=(12, 4),
            vocab_size=32000,
        ),
    ),
    Forward(
        "qwen3-moe",
        _text(
            *("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"use_cache": False}),
            hidden_size=(1024, 64),
            moe_intermediate_size=(512, 32),
            num_hidden_layers=(8, 2),
            num_attention_heads=(16, 4),
            num_key_value_heads=(4, 2),
            num_experts=(32, 4),
            num_experts_per_tok=(4, 2),
            head_dim=(64, 16),
            vocab_size=32000,
        ),
    ),
    Forward(
        "bert",
        _text(
            *("BertModel", "BertConfig", {"attention_mask": "ones"}),
            **{"intermediate_size": (3072, 128), "vocab_size": 30000, **SIZES},
        ),
    ),
    Forward(
        "deberta-v2",
        _text(
            *("DebertaV2Model", "DebertaV2Config", {"attention_mask": "ones"}),
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            **{"intermediate_size": (3072, 128), "vocab_size": 30000, **SIZES},
        ),
    ),
    Forward(
        "longformer",
        _text(
            *("LongformerModel", "LongformerConfig", {"attention_mask": "ones"}),
            **{"attention_window": (128, 8), "intermediate_size": (3072, 128), "vocab_size": 30000, **SIZES},
        ),
    ),
    Forward("vit", _image("ViTModel", "ViTConfig", intermediate_size=(3072, 128), image_size=(224, 32), **SIZES)),
    Forward(
        "swin",
        _image(
            *("SwinModel", "SwinConfig"),
            image_size=(224, 56),
            embed_dim=(96, 24),
            depths=([2, 2, 6, 2], [2, 2]),
            num_heads=([3, 6, 12, 24], [2, 4]),
            window_size=7,
        ),
    ),
    Forward("host-mask-and-table", _by_hand(HostMaskAndTable)),
    Forward("lengths-by-item", _by_hand(Lengths, "lengths")),
    Forward("unpadded-by-mask", _by_hand(Unpadded, "mask")),
    Forward("looped-experts", _by_hand(LoopedExperts)),
]
