"""Attention backends: one file each, behind one Protocol; chosen by phase, device and the cache's margin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from .base import LEFT_PADDING, SINKS, SOFTCAP, AttentionBackend, AttentionBatch
from .bound import bind
from .decode_batch import DecodeBatch
from .fit import require_fit
from .flash_attn2 import FlashAttention2
from .flash_attn3 import FlashAttention3
from .phased import PhasedAttention
from .reference import ReferenceAttention
from .sdpa import SdpaAttention
from .torch_varlen import TorchVarlenAttention
from .triton_decode import DecodeWorkspace, TritonDecodeAttention
from .uniform import UniformDecode, uniform_decode

if TYPE_CHECKING:
    from ..layout import KVLayout

__all__ = [
    "LEFT_PADDING",
    "SINKS",
    "SOFTCAP",
    "AttentionBackend",
    "AttentionBatch",
    "DecodeBatch",
    "DecodeWorkspace",
    "PhasedAttention",
    "TritonDecodeAttention",
    "UniformDecode",
    "backends",
    "bind",
    "choose",
    "choose_decode",
    "decode_backends",
    "get",
    "require_fit",
    "uniform_decode",
]

_BACKENDS: tuple[AttentionBackend, ...] = (
    FlashAttention3(),
    FlashAttention2(),
    TorchVarlenAttention(),
    SdpaAttention(),
    ReferenceAttention(),
)

# For batches in which every sequence has one new token, and no others.
_DECODE_ONLY: tuple[AttentionBackend, ...] = (TritonDecodeAttention(),)

# Prefill, causal, 32,768 tokens of 8B heads on an H100: FlashAttention-3 takes 12.8 ms, a FlashAttention-2 kernel
# (FlashInfer's) 22.1. It is worth its margin of mapped rows, unless the cache was opened without one.
_PREFILL = ("flash-attn-3", "flash-attn-2", "torch-varlen", "sdpa", "reference")

# Decode reads K and V once, at the speed of memory. µs per layer of FlashAttention-3 and -2 (vLLM's build of its kernel
# for KV caches) on interleaved K and V of 8B heads on an H100, batch x context: 13.0 and 11.1 at 1 x 1,024, 57.3 and
# 55.0 at 8 x 4,096, 193.1 and 200.3 at 32 x 4,096, 105.3 and 105.0 at 1 x 65,536; flash-attn 2.8.3's own is ahead but
# for one sequence of 4k to 16k tokens (experiments/07_decode_attention). So the kernel without a margin goes first.
# torch's varlen forward does not split a context over the GPU, which few long sequences need, so it comes after the
# kernel of vattn's own, for machines without either package.
_DECODE = ("flash-attn-2", "flash-attn-3", "triton-decode", "torch-varlen", "sdpa", "reference")


def backends() -> tuple[AttentionBackend, ...]:
    """All backends for any batch, whether or not they can run on this machine (ask ``supports``)."""
    return _BACKENDS


def decode_backends() -> tuple[AttentionBackend, ...]:
    """All backends, and those that compute one new token of each sequence and nothing else."""
    return _BACKENDS + _DECODE_ONLY


def get(name: str) -> AttentionBackend:
    """The backend of that name.

    Raises:
        ConfigError: no such backend; names those there are.
    """
    for backend in decode_backends():
        if backend.name == name:
            return backend
    names = ", ".join(backend.name for backend in decode_backends())
    raise ConfigError(f"unknown attention backend {name!r}, expected one of {names}")


def choose(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    max_over_read: int | None = None,
    features: frozenset[str] = frozenset(),
) -> AttentionBackend:
    """The preferred backend that can run there: one for both phases, or a ``PhasedAttention`` of two.

    Args:
        max_over_read: rows past the end of a sequence that may be read (``KVCache.over_read_tokens``); None for any,
            where the cache is opened with the margin of what is chosen.
        features: what else it has to support, of LEFT_PADDING, SOFTCAP and SINKS.

    Raises:
        ConfigError: none can; gives each one's reason.
    """
    device = torch.device(device)
    refused: dict[str, str] = {}
    usable: list[str] = []
    for backend in decode_backends():
        reason = backend.supports(device, dtype, head_dim)
        if reason is None and max_over_read is not None and backend.over_read_tokens > max_over_read:
            reason = f"reads {backend.over_read_tokens} rows past the end, {max_over_read} are allowed"
        if reason is None and not features <= backend.features:
            reason = f"has no {' or '.join(sorted(features - backend.features))}"
        if reason is None:
            usable.append(backend.name)
        else:
            refused[backend.name] = reason
    prefill = next((name for name in _PREFILL if name in usable), None)
    if prefill is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(f"no attention backend for {dtype}, head_dim {head_dim} on {device}: {reasons}")
    if dtype == torch.float32 and TritonDecodeAttention.name in usable:
        usable.remove(TritonDecodeAttention.name)  # outside graphs it was measured in half precision only
    decode = next(name for name in _DECODE if name in usable)
    return get(prefill) if prefill == decode else PhasedAttention(get(prefill), get(decode))


# For steps captured in a graph, where the view is as long as a sequence may ever become: vattn's kernel and
# FlashAttention-3 divide each sequence's own length over the GPU, FlashAttention-2 the view's.
_CAPTURED = ("triton-decode", "flash-attn-3", "flash-attn-2", "torch-varlen")


def choose_decode(layout: KVLayout, device: torch.device, max_over_read: int | None = None) -> AttentionBackend:
    """The preferred backend for a decode loop: on a GPU one that takes lengths from the device.

    Args:
        layout: of the cache.
        device: where it is.
        max_over_read: rows past the end of a sequence that may be read; None for any.

    Raises:
        ConfigError: there is none; gives each one's reason.
    """
    head_dims = {size or group.head_dim for group in layout.groups for size in (group.head_dim, group.v_head_dim)}
    if device.type != "cuda":
        return get("sdpa")
    refused = []
    for name in _CAPTURED:
        backend = get(name)
        reasons = [backend.supports(device, layout.dtype, size) for size in head_dims]
        if max_over_read is not None and backend.over_read_tokens > max_over_read:
            reasons.append(f"reads {backend.over_read_tokens} rows past the end, {max_over_read} are allowed")
        if len(head_dims) > 1 and name != TritonDecodeAttention.name:
            reasons.append("needs K and V heads of one size")
        if not any(reasons):
            return backend
        refused.append(f"{name}: {next(filter(None, reasons))}")
    raise ConfigError(f"no attention for captured decode steps on {device}: {'; '.join(refused)}")
