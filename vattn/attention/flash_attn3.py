"""FlashAttention-3, for Hopper GPUs: the fastest prefill there is on them, and the one that reads past the end."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch

from .base import HALF, LEFT_PADDING, SINKS, SOFTCAP, Backend, apply_sinks, require_equal_head_dims
from .batch import AttentionBatch

__all__ = ["FlashAttention3"]

_HEAD_DIMS = (64, 96, 128, 192, 256)


class FlashAttention3(Backend):
    """``flash_attn_interface.flash_attn_with_kvcache``: one call for a whole batch, prefill and decode mixed.

    K and V come by TMA in whole tiles, of which only the first and last are masked: an unmapped page under a tile is an
    illegal address, and a NaN in V times a probability of zero is a NaN in the output. Measured on an H100 with
    head_dim 128: 128 to 175 rows past the end had to be mapped. That fits the tile sizes in its source, in rows of K
    (hopper/tile_size.h, 2-byte elements; a decode step without a window counts as not causal):

    ======== ====== ====== =======
    head_dim causal window neither
    ======== ====== ====== =======
    64       128    160    192
    96       144    128    144
    128      128    128    176
    192      128    96     128
    256      80     64     80
    ======== ====== ====== =======

    A tile holds at least one live row, so no kernel reads more than 191 rows past the end.
    """

    name = "flash-attn-3"
    over_read_tokens = 191
    masks_over_read = False
    captures_prompts = True
    mixed_head_dims = False
    dtypes = HALF
    min_capability = (9, 0)
    head_dim_multiple, max_head_dim = 8, 256

    @property
    def features(self) -> frozenset[str]:
        """Soft-capping only where the build has it."""
        capped = not _build_flags().get("FLASHATTENTION_DISABLE_SOFTCAP", False)
        return frozenset({LEFT_PADDING, SINKS, SOFTCAP} if capped else {LEFT_PADDING, SINKS})

    def unavailable(self) -> str | None:
        return _unavailable()

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if reason := super().supports(device, dtype, head_dim):
            return reason
        capability = torch.cuda.get_device_capability(device)
        if capability[0] != 9:
            return f"needs a Hopper GPU (compute capability 9.x), got {capability[0]}.{capability[1]}"
        return _unsupported_by_build(dtype, head_dim)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`vattn.attention.AttentionBackend`."""
        from flash_attn_interface import flash_attn_with_kvcache

        require_equal_head_dims(self, k, v)
        is_decode = batch.max_query_len == 1
        out = flash_attn_with_kvcache(
            q[:, None] if is_decode else q,
            # The heuristic for the number of splits looks at the view's length, not at the sequences'.
            k[:, : batch.max_end],
            v[:, : batch.max_end],
            cache_seqlens=batch.ends_int32,  # counted from row 0, also where a sequence starts later
            cache_batch_idx=batch.slots_int32,
            cache_leftpad=batch.starts_int32,
            cu_seqlens_q=None if is_decode else batch.cu_seqlens_q,
            max_seqlen_q=None if is_decode else batch.max_query_len,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            return_softmax_lse=sinks is not None,
        )
        if sinks is None:
            return out[:, 0] if is_decode else out
        out, lse, *_ = out  # lse: [sequences, heads, 1] of a decode step, [heads, tokens] otherwise
        if is_decode:
            return apply_sinks(out[:, 0], lse[..., 0], sinks)
        return apply_sinks(out, lse.transpose(0, 1), sinks)


@cache
def _unavailable() -> str | None:
    """Why the module cannot be used; imports it, so only where the rest fits."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return (
            "FlashAttention-3 is not installed: build it from the folder hopper of "
            "https://github.com/Dao-AILab/flash-attention"
        )
    try:
        importlib.import_module("flash_attn_interface")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or without its kernels
        return f"FlashAttention-3 cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


@cache
def _build_flags() -> dict[str, bool]:
    """What its build left out, ``FLASHATTENTION_DISABLE_…``; empty where the build does not say."""
    try:
        return dict(importlib.import_module("flash_attn_config").CONFIG["build_flags"])
    except (ImportError, AttributeError, KeyError):
        return {}


def _unsupported_by_build(dtype: torch.dtype, head_dim: int) -> str | None:
    flags = _build_flags()

    def disabled(feature: str) -> bool:
        return flags.get(f"FLASHATTENTION_DISABLE_{feature}", False)

    largest = max((size for size in _HEAD_DIMS if not disabled(f"HDIM{size}")), default=0)
    if head_dim % 8 or not 8 <= head_dim <= largest:  # smaller ones run on the next larger kernel
        return f"expected a head_dim that is a multiple of 8 and at most {largest}, got {head_dim}"
    # Lengths per sequence need VARLEN, sliding windows LOCAL.
    missing = [feature for feature in ("VARLEN", "LOCAL") if disabled(feature)]
    if dtype == torch.float16 and disabled("FP16"):
        missing.append("FP16")
    return f"this FlashAttention-3 was built without {', '.join(missing)}" if missing else None
