"""What an attention backend is, and what it declares about itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import ConfigError
from .batch import AttentionBatch

__all__ = [
    "LEFT_PADDING",
    "SINKS",
    "SOFTCAP",
    "AttentionBackend",
    "Backend",
    "PhasedAttention",
    "apply_sinks",
    "bind",
    "declared",
    "listed",
    "require_equal_head_dims",
]

# What a backend may support beyond causal attention and sliding windows, in its ``features``.
LEFT_PADDING = "left padding"  # a batch with ``starts``
SOFTCAP = "soft-capping"
SINKS = "sinks"

HALF = (torch.float16, torch.bfloat16)


@runtime_checkable
class AttentionBackend(Protocol):
    """Causal attention over the cache's own views.

    The views cover addresses with nothing behind them, and one read there ends the process. A backend therefore
    declares how far it reads past the end of a sequence, and the cache keeps that many rows mapped.

    A backend may also have the attributes ``mixed_head_dims``, ``decode_only``, ``capturable``,
    ``captures_prompts`` and ``optimised`` of :class:`Backend`, which says what is taken for granted where one is
    missing.

    Attributes:
        name: the key in the registry.
        over_read_tokens: rows past ``seq_len`` that the kernel may load.
        masks_over_read: whether values lying in those rows (a NaN, say) can never reach an output.
        features: those of LEFT_PADDING, SOFTCAP and SINKS that it supports. Only backends that declare them are given a
            batch with ``starts``, a ``softcap`` or ``sinks``.
    """

    @property
    def name(self) -> str: ...

    @property
    def over_read_tokens(self) -> int: ...

    @property
    def masks_over_read(self) -> bool: ...

    @property
    def features(self) -> frozenset[str]: ...

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """None when this backend can run there, else the reason why not, as a phrase."""
        ...

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
        """Attention of the new tokens over their sequences.

        Args:
            q: ``[num_tokens, num_heads, head_dim]``, packed in the batch's order.
            k: ``[max_slots, max_seq_len, num_kv_heads, head_dim]``, the cache's full view; the new rows are written.
            v: ``[max_slots, max_seq_len, num_kv_heads, v_head_dim]``. Query head ``h`` reads KV head
                ``h // (num_heads // num_kv_heads)``.
            batch: slots and lengths.
            scale: multiplies the scores, usually ``head_dim ** -0.5``.
            window: sliding window in tokens, the query's own row included; None for all rows before it.
            softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap.
            sinks: ``[num_heads]``, a further score per head that takes its share of the softmax (``apply_sinks``).

        Returns:
            ``[num_tokens, num_heads, v_head_dim]`` in q's dtype. The mask is causal with the queries right-aligned: the
            last query of a sequence sees all of its ``seq_len`` rows.
        """
        ...


class Backend(AttentionBackend):
    """What vattn's own backends derive from: the declarations, and ``supports``, which follows from them.

    Attributes:
        mixed_head_dims: whether K and V heads, and those of several layers, may differ in size.
        decode_only: whether it computes batches of one new token of each sequence, and no others.
        capturable: whether a CUDA graph can capture a decode step with it: it takes slots and lengths from the batch's
            device tensors.
        captures_prompts: whether a CUDA graph can capture a pass over a ``PromptBatch`` with it.
        optimised: whether it is meant for more than tests.
        dtypes: that it computes in; None for every floating-point one.
        min_capability: CUDA compute capability that it needs; None where it runs on any device.
        max_head_dim, head_dim_multiple: head sizes that it has kernels for; None for all.
    """

    over_read_tokens: int = 0
    masks_over_read: bool = True
    mixed_head_dims: bool = True
    decode_only: bool = False
    capturable: bool = True
    captures_prompts: bool = False
    optimised: bool = True
    dtypes: tuple[torch.dtype, ...] | None = None
    min_capability: tuple[int, int] | None = None
    max_head_dim: int | None = None
    head_dim_multiple: int = 1

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """None when this backend can run there, else the reason why not, as a phrase."""
        if self.min_capability is not None and device.type != "cuda":
            return f"needs an NVIDIA GPU, got device {device}"
        if self.dtypes is None and not dtype.is_floating_point:
            return f"expected a floating-point dtype, got {dtype}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"expected {listed(str(each).removeprefix('torch.') for each in self.dtypes)}, got {dtype}"
        if self.max_head_dim is not None and (head_dim > self.max_head_dim or head_dim % self.head_dim_multiple):
            multiple = f"that is a multiple of {self.head_dim_multiple} and" if self.head_dim_multiple > 1 else "of"
            return f"expected a head_dim {multiple} at most {self.max_head_dim}, got {head_dim}"
        if reason := self.unavailable():
            return reason
        if self.min_capability is not None:
            if not torch.cuda.is_available():
                return "PyTorch finds no NVIDIA GPU"
            if torch.cuda.get_device_capability(device) < self.min_capability:
                return "needs a GPU of compute capability {}.{} or newer".format(*self.min_capability)
        return None

    def unavailable(self) -> str | None:
        """Why the package behind it cannot be used; None when it can."""
        return None

    def tuned(self, options: dict[str, Any], *, pdl: bool) -> AttentionBackend:
        """The same with options of a tuning table.

        Args:
            pdl: whether kernels take programmatic dependent launch.
        """
        return self

    def bound(self) -> AttentionBackend:
        """The same with memory of its own, as ``bind`` says."""
        return self


@dataclass(frozen=True)
class PhasedAttention:
    """Two backends as one: ``decode`` where every sequence has one new token, else ``prefill``.

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

    @property
    def mixed_head_dims(self) -> bool:
        """Whether both take head sizes that differ."""
        return declared(self.prefill, "mixed_head_dims") and declared(self.decode, "mixed_head_dims")

    @property
    def capturable(self) -> bool:
        """Whether the one for decode can be captured."""
        return bool(declared(self.decode, "capturable"))

    @property
    def captures_prompts(self) -> bool:
        """Whether passes of the one for prefill can be captured."""
        return bool(declared(self.prefill, "captures_prompts"))

    @property
    def optimised(self) -> bool:
        """Whether either is meant for more than tests."""
        return declared(self.prefill, "optimised") or declared(self.decode, "optimised")

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """The first reason against either, None when both can run."""
        for backend in (self.prefill, self.decode):
            if reason := backend.supports(device, dtype, head_dim):
                return f"{backend.name}: {reason}"
        return None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, **options: Any
    ) -> torch.Tensor:
        """See :class:`vattn.attention.AttentionBackend`."""
        backend = self.decode if batch.max_query_len == 1 else self.prefill
        return backend(q, k, v, batch, **options)


def declared(backend: AttentionBackend, attribute: str) -> Any:
    """One of the attributes that a backend may leave out."""
    return getattr(backend, attribute, getattr(Backend, attribute))


def bind(backend: AttentionBackend) -> AttentionBackend:
    """The decode half of a backend, with memory of its own where its kernels need some between them.

    The result is for one stream and one launch at a time: two decode loops each bind their own.
    """
    if isinstance(backend, PhasedAttention):
        backend = backend.decode
    return backend.bound() if isinstance(backend, Backend) else backend


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Add a sink to attention that was computed without one.

    A sink is one more score in the softmax, with no value behind it: the sum of exponentials grows from ``exp(lse)`` to
    ``exp(lse) + exp(sink)``, so the output shrinks by ``sigmoid(lse - sink)`` (Xiao et al., arXiv 2309.17453; learned
    ones as in gpt-oss).

    Args:
        out: ``[num_tokens, num_heads, head_dim]``.
        lse: ``[num_tokens, num_heads]`` float32, the natural logarithm of the sum of exponentials of the scores.
        sinks: ``[num_heads]``.
    """
    return (out * torch.sigmoid(lse - sinks.to(lse.dtype))[..., None]).to(out.dtype)


def require_equal_head_dims(backend: AttentionBackend, k: torch.Tensor, v: torch.Tensor) -> None:
    """For kernels whose K and V heads must be of one size.

    Raises:
        ConfigError: they are not.
    """
    if k.shape[-1] != v.shape[-1]:
        raise ConfigError(f"{backend.name} needs K and V heads of one size, got {k.shape[-1]} and {v.shape[-1]}")


def listed(names: Iterable[str]) -> str:
    """As ``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
