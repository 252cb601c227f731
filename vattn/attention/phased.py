"""Two backends as one: a decode step and a prefill ask different things of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import AttentionBackend, AttentionBatch

__all__ = ["PhasedAttention"]


@dataclass(frozen=True)
class PhasedAttention:
    """``decode`` where every sequence has one new token, else ``prefill``; with the over-read of the worse.

    Attributes:
        prefill: computes passes in which any sequence has several new tokens.
        decode: computes the others.
    """

    prefill: AttentionBackend
    decode: AttentionBackend

    @property
    def name(self) -> str:
        """As ``flash-attn-3+flash-attn-2``: prefill, then decode."""
        return f"{self.prefill.name}+{self.decode.name}"

    @property
    def over_read_tokens(self) -> int:
        """Rows past the end that either may load."""
        return max(self.prefill.over_read_tokens, self.decode.over_read_tokens)

    @property
    def masks_over_read(self) -> bool:
        """Whether each of them masks what it reads there."""
        return self.prefill.masks_over_read and self.decode.masks_over_read

    @property
    def features(self) -> frozenset[str]:
        """What both support."""
        return self.prefill.features & self.decode.features

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """The first reason against either, None when both can run."""
        for backend in (self.prefill, self.decode):
            if reason := backend.supports(device, dtype, head_dim):
                return f"{backend.name}: {reason}"
        return None

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
        backend = self.decode if batch.max_query_len == 1 else self.prefill
        return backend(q, k, v, batch, scale=scale, window=window, softcap=softcap, sinks=sinks)
