"""Eager decode steps of equally long sequences in two launches a layer: the append, and attention in place.

What such a step costs is the host's time: two copies of a layer's K and V, and torch's FlashAttention, which allocates
and launches several times. Here each is one launch, repeated by ``Relaunch``. Not to be captured in a graph: how many
rows there are is the host's to say.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..ops.relaunch import Relaunch
from ..ops.triton_support import address_of, interpreted, next_power_of_2, require_triton
from .triton_decode import DecodeWorkspace, TritonDecodeAttention, query_arguments

__all__ = ["StepState", "UniformStep", "supports_uniform_step"]

_ATTENTION = TritonDecodeAttention()
_num_splits = lru_cache(64)(_ATTENTION.num_splits)  # all layers of a step ask the same


def supports_uniform_step(device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> bool:
    """Whether ``UniformStep`` can be had: on NVIDIA GPUs with Triton. Its interpreter copies tensors of a GPU to the
    host, and could do nothing with an address there."""
    return not interpreted() and _ATTENTION.supports(device, dtype, max(head_dim, v_head_dim)) is None


class StepState:
    """What the layers of one cache share: they attend one after another.

    Args:
        batch_size: sequences, in slots 0, 1, ….
        max_rows: that a sequence may have.
    """

    def __init__(self, batch_size: int, max_rows: int, device: torch.device) -> None:
        self.batch_size, self.max_rows, self.device = batch_size, max_rows, device
        with torch.inference_mode(False):  # or nothing could be written to them outside of it
            self.slots = torch.arange(batch_size, dtype=torch.int32, device=device)
            self._ends = torch.zeros_like(self.slots)
        self._end: int | None = None
        self._starts: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._workspaces: dict[tuple[int, int, int], DecodeWorkspace] = {}

    def ends(self, end: int) -> torch.Tensor:
        """``[batch_size]`` int32, all ``end``; filled for the first layer of a pass."""
        if self._end != end:
            self._end = None  # until it is done
            self._ends.fill_(end)
            self._end = end
        return self._ends

    def starts(self, starts: tuple[int, ...]) -> torch.Tensor:
        """``[batch_size]`` int32; a new one waits for the copy."""
        if self._starts is None or self._starts[0] != starts:
            if self._starts is not None and self.device.type == "cuda":
                self._starts[1].record_stream(torch.cuda.current_stream(self.device))  # which may still read it
            with torch.inference_mode(False):
                self._starts = starts, torch.tensor(starts, dtype=torch.int32, device=self.device)
        return self._starts[1]

    def workspace(self, num_heads: int, num_kv_heads: int, v_head_dim: int) -> DecodeWorkspace:
        """For layers of this shape."""
        shape = (num_heads, num_kv_heads, v_head_dim)
        if shape not in self._workspaces:
            with torch.inference_mode(False):
                self._workspaces[shape] = _ATTENTION.workspace(self.batch_size, *shape, self.max_rows, self.device)
        return self._workspaces[shape]


class UniformStep:
    """The launches of one layer.

    Args:
        state: shared by the layers.
        k, v: the layer's views, ``[batch, max_rows, num_kv_heads, head_dim]`` and ``[…, v_head_dim]``, backed as far as
            there are rows. They must outlive this object.

    Raises:
        ConfigError: they are not on a GPU.
    """

    def __init__(self, state: StepState, k: torch.Tensor, v: torch.Tensor) -> None:
        require_triton(k, v)
        self._state = state
        self._k, self._v = k, v
        self._num_kv_heads, self._v_head_dim = k.shape[2], v.shape[3]
        self._key: tuple[object, ...] | None = None
        self._launch: Relaunch
        self._append_key: tuple[object, ...] | None = None
        self._append: Relaunch

    def append(self, new_k: torch.Tensor, new_v: torch.Tensor, end: int) -> None:
        """Write the newest token of each sequence.

        Args:
            new_k, new_v: ``[batch, num_kv_heads, 1, head_dim]`` and ``[…, v_head_dim]``, the last axis contiguous, of
                the views' dtype.
            end: rows of every sequence, this one included.
        """
        ends = self._state.ends(end)
        key = (new_k.stride(), new_v.stride())
        if key != self._append_key:
            self._append_key = None  # should this be interrupted
            self._append = self._prepare_append(new_k, new_v)
            self._append_key = key
        self._append((new_k.shape[0], self._num_kv_heads, 1), new_k, new_v, ends)

    def attend(
        self,
        q: torch.Tensor,
        end: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        starts: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Attention of one token of each sequence over its first ``end`` rows.

        Args:
            q: ``[batch, num_heads, 1, head_dim]``, the last axis contiguous.
            end: rows of every sequence, its newest included.
            scale: None for ``head_dim ** -0.5``.
            window, softcap, sinks: as in :class:`vattn.attention.AttentionBackend`.
            starts: first row of each sequence; None for 0.

        Returns:
            ``[batch, 1, num_heads, v_head_dim]``, without gradients.
        """
        state = self._state
        batch_size, num_heads, _, _ = q.shape
        out = q.new_empty((batch_size, 1, num_heads, self._v_head_dim))
        ends = state.ends(end)
        first_rows = ends if starts is None else state.starts(starts)
        sinks_dtype = None if sinks is None else sinks.dtype
        key = (q.stride(), num_heads, scale, window, softcap, sinks_dtype, starts is None)
        if key != self._key:
            self._key = None  # should this be interrupted
            features: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": sinks}
            scale = q.shape[3] ** -0.5 if scale is None else scale
            self._launch = self._prepare(q, out, None if starts is None else first_rows, scale=scale, **features)
            self._key = key
        rows = end if window is None else min(end, window)
        splits = _num_splits(batch_size, self._num_kv_heads, rows, state.device)
        grid = (splits, self._num_kv_heads, batch_size)
        self._launch(grid, q, out, ends, first_rows, q if sinks is None else sinks)
        return out

    def _prepare(self, q: torch.Tensor, out: torch.Tensor, starts: torch.Tensor | None, **options: Any) -> Relaunch:
        from .triton_decode_kernels import decode_attention_kernel

        state = self._state
        arguments, compiled = _ATTENTION.arguments(
            *(self._k, self._v, out.squeeze(1), state.slots, state.slots, starts),
            workspace=state.workspace(q.shape[1], self._num_kv_heads, self._v_head_dim),
            **options,
        )
        arguments |= query_arguments(q.squeeze(2))
        varying = ("q_ptr", "out_ptr", "ends_ptr", "starts_ptr", "sinks_ptr")
        for name in varying:
            del arguments[name]
        return Relaunch(decode_attention_kernel, arguments, varying, q.device, compiled)

    def _prepare_append(self, new_k: torch.Tensor, new_v: torch.Tensor) -> Relaunch:
        from .triton_decode_kernels import append_kernel

        k, v = self._k, self._v
        (k_address, dtype, _), (v_address, _, _) = address_of(k), address_of(v)
        arguments: dict[str, Any] = {"k_address": k_address, "v_address": v_address, "DTYPE": dtype}
        arguments |= {"D": k.shape[3], "DV": v.shape[3]}
        for name, new, view in (("k", new_k, k), ("v", new_v, v)):
            arguments[f"new_{name}_stride"], arguments[f"new_{name}_head_stride"] = new.stride(0), new.stride(1)
            strides = zip((f"{name}_stride", f"{name}_row_stride", f"{name}_head_stride"), view.stride(), strict=False)
            arguments.update(strides)
        arguments["BLOCK_D"], arguments["BLOCK_DV"] = (next_power_of_2(x.shape[3]) for x in (k, v))
        return Relaunch(append_kernel, arguments, ("new_k_ptr", "new_v_ptr", "ends_ptr"), k.device, {"num_warps": 1})
