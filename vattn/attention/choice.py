"""Every backend by its name, what may be asked of one, and the one function that chooses among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import shown
from ..errors import ConfigError
from .base import HALF, AttentionBackend, Backend, PhasedAttention, declared, listed
from .flash_attn2 import FlashAttention2
from .flash_attn3 import FlashAttention3
from .reference import ReferenceAttention
from .sdpa import SdpaAttention
from .torch_varlen import TorchVarlenAttention
from .triton_decode import TritonDecodeAttention

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..layout import KVLayout

__all__ = [
    "Needs",
    "backend_of",
    "backends",
    "choose",
    "choose_phases",
    "decode_backends",
    "get",
    "pick",
    "reason_against",
    "require_fit",
]

_ALL: tuple[Backend, ...] = (
    FlashAttention3(),
    FlashAttention2(),
    TorchVarlenAttention(),
    SdpaAttention(),
    ReferenceAttention(),
    TritonDecodeAttention(),
)

# The orders below hold where no table of ``vattn.tuning`` has a measurement.
#
# Prefill, causal, 32,768 tokens of 8B heads on an H100: FlashAttention-3 takes 12.8 ms, a FlashAttention-2 kernel
# (FlashInfer's) 22.1. It is worth its margin of mapped rows, unless the cache was opened without one.
_PREFILL = ("flash-attn-3", "flash-attn-2", "torch-varlen", "sdpa", "reference")

# Decode reads K and V once, at the speed of memory. µs per layer of FlashAttention-3 and -2 (vLLM's build of its kernel
# for KV caches) on interleaved K and V of 8B heads on an H100, batch x context: 13.0 and 11.1 at 1 x 1,024, 57.3 and
# 55.0 at 8 x 4,096, 193.1 and 200.3 at 32 x 4,096, 105.3 and 105.0 at 1 x 65,536; flash-attn 2.8.3's own is ahead but
# for one sequence of 4k to 16k tokens (experiments/07_decode_attention). So the kernel without a margin goes first.
# torch's varlen forward does not split a context over the GPU, which few long sequences need, so it comes after the
# kernel of vattn's own, for machines without either package. Outside of graphs that one was measured in half precision,
# with heads of one size, and is chosen for nothing else.
_DECODE = ("flash-attn-2", "flash-attn-3", "triton-decode", "torch-varlen", "sdpa", "reference")
_DECODE_UNMEASURED = ("flash-attn-2", "flash-attn-3", "torch-varlen", "sdpa", "reference")

# In a captured step the view is as long as a sequence may ever become: vattn's kernel and FlashAttention-3 divide each
# sequence's own length over the GPU, FlashAttention-2 the view's.
_CAPTURED = ("triton-decode", "flash-attn-3", "flash-attn-2", "torch-varlen")


def backends() -> tuple[AttentionBackend, ...]:
    """All backends for any batch, whether or not they can run on this machine (ask ``supports``)."""
    return tuple(backend for backend in _ALL if not backend.decode_only)


def decode_backends() -> tuple[AttentionBackend, ...]:
    """All backends, those included that compute one new token of each sequence and nothing else."""
    return _ALL


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: no such backend; names those there are.
    """
    for backend in _ALL:
        if backend.name == name:
            return backend
    names = ", ".join(backend.name for backend in _ALL)
    raise ConfigError(f"unknown attention backend {name!r}, expected one of {names}")


def backend_of(given: AttentionBackend | str) -> AttentionBackend:
    """A backend, or that of a name.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, str):
        return get(given)
    if isinstance(given, type) or not hasattr(given, "over_read_tokens") or not callable(given):
        raise ConfigError(f"attention must be a backend or its name, as 'sdpa', got {shown(given)}")
    return given


@dataclass(frozen=True)
class Needs:
    """What a backend is wanted for.

    Attributes:
        device, dtype: of q, K and V.
        head_dims: the sizes of K and V heads, of every layer.
        features: of LEFT_PADDING, SOFTCAP and SINKS.
        max_over_read: rows past the end of a sequence that may be read; None for any number.
        decode: whether every sequence has one new token in every batch.
        captured: whether the launch is captured in a CUDA graph.
    """

    device: torch.device
    dtype: torch.dtype
    head_dims: frozenset[int]
    features: frozenset[str] = frozenset()
    max_over_read: int | None = None
    decode: bool = False
    captured: bool = False

    @classmethod
    def of(cls, layout: KVLayout, device: torch.device, **others: Any) -> Needs:
        """What all layers of a cache need together; ``others`` are further attributes."""
        sizes = {size or group.head_dim for group in layout.groups for size in (group.head_dim, group.v_head_dim)}
        return cls(device, layout.dtype, frozenset(sizes), **others)

    def __str__(self) -> str:
        phase = "captured decode steps" if self.captured else "decode steps" if self.decode else "prefill"
        return f"{phase} with {self.dtype} and head_dim {listed(map(str, sorted(self.head_dims)))} on {self.device}"


def reason_against(backend: AttentionBackend, needs: Needs) -> str | None:
    """Why a backend, by what it declares, cannot do what is needed, as a phrase; None when it can."""
    for head_dim in sorted(needs.head_dims):
        if reason := backend.supports(needs.device, needs.dtype, head_dim):
            return reason
    if len(needs.head_dims) > 1 and not declared(backend, "mixed_head_dims"):
        return f"needs K and V heads of one size, got {' and '.join(map(str, sorted(needs.head_dims)))}"
    if needs.max_over_read is not None and backend.over_read_tokens > needs.max_over_read:
        return f"reads {backend.over_read_tokens} rows past the end, {needs.max_over_read} are allowed"
    if missing := needs.features - backend.features:
        return f"has no {' or '.join(sorted(missing))}"
    if declared(backend, "decode_only") and not needs.decode:
        return "computes one new token of each sequence and no prefill"
    if needs.captured and not declared(backend, "capturable"):
        return "reads lengths on the host; pass graphs='never' or another backend"
    return None


def pick(needs: Needs, measured: Iterable[AttentionBackend] = (), name: str | None = None) -> AttentionBackend:
    """The first backend that can do what is needed.

    Args:
        measured: those measured for such a case, fastest first; the others come after them in a fixed order.
        name: the only one to consider; None for all.

    Raises:
        ConfigError: none can; gives each one's reason.
    """
    refused: dict[str, str] = {}
    for backend in (*measured, *map(get, _order(needs))) if name is None else (get(name),):
        reason = reason_against(backend, needs)
        if reason is None:
            return backend
        refused[backend.name] = reason
    if name is not None:
        raise ConfigError(f"attention {name!r} cannot be used here: {refused[name]}")
    reasons = "; ".join(f"{each}: {reason}" for each, reason in refused.items())
    raise ConfigError(f"no attention backend for {needs}: {reasons}")


def _order(needs: Needs) -> tuple[str, ...]:
    if not needs.decode:
        return _PREFILL
    if needs.captured:
        return _CAPTURED
    return _DECODE if needs.dtype in HALF and len(needs.head_dims) == 1 else _DECODE_UNMEASURED


def choose_phases(needs: Needs, measured: Iterable[AttentionBackend] = (), name: str | None = None) -> AttentionBackend:
    """``pick`` for prefill and for decode steps: one backend for both, or a ``PhasedAttention`` of two.

    Args:
        measured: for prefill.

    Raises:
        ConfigError: as ``pick``.
    """
    prefill = pick(needs, measured, name)
    decode = pick(replace(needs, decode=True), (), name)
    return prefill if prefill is decode else PhasedAttention(prefill, decode)


def choose(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    max_over_read: int | None = None,
    features: frozenset[str] = frozenset(),
    name: str | None = None,
) -> AttentionBackend:
    """The preferred backend that can run there: one for both phases, or a ``PhasedAttention`` of two.

    Args:
        v_head_dim: the size of V's heads; None for K's.
        max_over_read: rows past the end of a sequence that may be read (``KVCache.over_read_tokens``); None for any,
            where the cache is opened with the margin of what is chosen.
        features: what else it has to support, of LEFT_PADDING, SOFTCAP and SINKS.
        name: the backend that the user asked for; None for the best.

    Raises:
        ConfigError: none can; gives each one's reason.
    """
    head_dims = frozenset({head_dim, v_head_dim or head_dim})
    return choose_phases(Needs(torch.device(device), dtype, head_dims, features, max_over_read), name=name)


def require_fit(
    attention: AttentionBackend,
    cache: KVCache,
    *,
    captured: bool = False,
    features: frozenset[str] = frozenset(),
) -> None:
    """Refuse a backend that cannot run over this cache, could fault on it, or could see what another sequence left.

    Args:
        captured: whether its launches are captured in CUDA graphs.
        features: what else it has to support, of LEFT_PADDING, SOFTCAP and SINKS.

    Raises:
        ConfigError: it does not support that, or the cache's device, dtype or head sizes, reads further past the end
            than the cache keeps rows mapped, or does not mask what it reads there although the cache was told so.
    """
    rows = attention.over_read_tokens
    if rows > cache.over_read_tokens:
        raise ConfigError(
            f"attention {attention.name!r} reads up to {rows} rows past the end of a sequence, this cache keeps "
            f"{cache.over_read_tokens} mapped; open it with over_read_tokens={rows}"
        )
    if rows and not attention.masks_over_read and cache.over_read_masked:
        raise ConfigError(
            f"attention {attention.name!r} does not mask what it reads past the end of a sequence; open the cache with "
            f"over_read_masked=False"
        )
    for group in cache.layout.groups:  # each launch has the heads of one layer
        head_dims = frozenset({group.head_dim, group.v_head_dim or group.head_dim})
        needs = Needs(cache.device, cache.layout.dtype, head_dims, features, decode=True, captured=captured)
        if reason := reason_against(attention, needs):
            raise ConfigError(f"attention {attention.name!r} cannot be used here: {reason}")
