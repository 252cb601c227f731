"""Decode attention as one Triton kernel that splits each context over the GPU and takes all lengths from the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from ..errors import ConfigError
from ..ops.compiled import block_shared_bytes
from ..ops.triton_support import address_of, interpreted, launch_options, next_power_of_2, unavailable
from .base import HALF, LEFT_PADDING, SINKS, SOFTCAP, Backend
from .batch import INT32_MAX, AttentionBatch

__all__ = ["DecodeWorkspace", "TritonDecodeAttention", "choose_splits"]

LOG2_E = 1.4426950408889634

# Programs that a launch should have for each streaming multiprocessor (SM), and the most splits of one context: the
# combination of that many is no longer small beside a program's own rows.
PROGRAMS_PER_SM = 2
MAX_SPLITS = 64

# Where there is no GPU to ask: an H100's.
DEFAULT_SMS = 132
DEFAULT_SHARED_BYTES = 227 * 1024

# Float32 elements that the combination of the splits holds at a time: 64 registers a thread with four warps.
COMBINED_AT_ONCE = 8192


def choose_splits(
    batch_size: int, num_kv_heads: int, max_end: int, num_sms: int = DEFAULT_SMS, block_n: int = 64
) -> int:
    """Programs that share the rows of one sequence and KV head.

    As many as keep the launch within about ``PROGRAMS_PER_SM`` programs for each SM, so that all run at once, and no
    more than there are blocks of rows.

    Args:
        max_end: no sequence has more rows that its query sees.
        block_n: rows of a block.
    """
    blocks = max(1, -(-max_end // block_n))
    return max(1, min(PROGRAMS_PER_SM * num_sms // (batch_size * num_kv_heads), MAX_SPLITS, blocks))


@dataclass(frozen=True)
class DecodeWorkspace:
    """What the splits of a launch leave for their combination; for launches that follow one another on one stream.

    Attributes:
        partials: float32, one-dimensional; never has to be cleared.
        counters: int32, one for each sequence and KV head; zeros, to which every launch returns them.
    """

    partials: torch.Tensor
    counters: torch.Tensor


@dataclass(frozen=True)
class TritonDecodeAttention(Backend):
    """Split-KV decoding (Dao et al., "Flash-Decoding", 2023) for batches in which every sequence has one new token.

    A program takes the query heads of one KV head and a part of one sequence's rows, with an online softmax (Milakov &
    Gimelshein, arXiv 1805.02867). The last program of a sequence and KV head to finish combines what all of them found.
    Rows are divided on the device by each sequence's actual length, and those that a query does not see are not read.

    Lengths, starts and slots come from the batch's device tensors alone; ``max_end`` is an upper bound. A launch can
    therefore be captured in a CUDA graph and replayed for other lengths.

    Attributes:
        block_n: rows of K and V that a program takes at a time, a power of two of at least 16.
        num_warps: of a program.
        num_stages: blocks of rows in flight; fewer where shared memory does not hold them.
        splits: programs to a sequence and KV head; None for ``choose_splits``.
        fused_combine: the last program combines; False for a second kernel that does.
        pdl: launch programmatically dependent on the kernel before, on Hopper and later.
        workspaces: of ``bound``, by what they are for; None where each launch allocates its own.
    """

    name = "triton-decode"
    features = frozenset({LEFT_PADDING, SOFTCAP, SINKS})
    decode_only = True
    dtypes = (*HALF, torch.float32)
    min_capability = (8, 0)
    max_head_dim = 256

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    splits: int | None = None
    fused_combine: bool = True
    pdl: bool = False
    workspaces: dict[tuple[Any, ...], DecodeWorkspace] | None = field(default=None, compare=False, repr=False)

    def unavailable(self) -> str | None:
        return unavailable()

    def tuned(self, options: dict[str, Any], *, pdl: bool) -> TritonDecodeAttention:
        return replace(self, **options, pdl=pdl)

    def bound(self) -> TritonDecodeAttention:
        """Keeps the workspace that the first launch of each shape makes, so that one captured later allocates none."""
        return replace(self, workspaces={})

    def workspace(
        self,
        max_batch_size: int,
        num_heads: int,
        num_kv_heads: int,
        v_head_dim: int,
        max_end: int,
        device: torch.device | str,
    ) -> DecodeWorkspace:
        """One that is large enough for every launch within these bounds."""
        device = torch.device(device)
        programs = 0
        for batch_size in range(1, max_batch_size + 1):
            splits = self.num_splits(batch_size, num_kv_heads, max_end, device)
            programs = max(programs, batch_size * splits if splits > 1 else 0)
        return DecodeWorkspace(
            torch.empty(programs * num_heads * (v_head_dim + 2), dtype=torch.float32, device=device),
            torch.zeros(max_batch_size * num_kv_heads, dtype=torch.int32, device=device),
        )

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
        out: torch.Tensor | None = None,
        workspace: DecodeWorkspace | None = None,
    ) -> torch.Tensor:
        """See :class:`vattn.attention.AttentionBackend`.

        Args:
            batch: of it only ``batch_size``, ``max_query_len``, ``max_end`` and the int32 tensors of slots, ends and
                starts are used; a slot may be listed several times.
            out: ``[batch_size, num_heads, v_head_dim]``, the last axis contiguous; None to allocate it.
            workspace: None to take the bound one, or to allocate one, with a kernel that clears the counters.

        Raises:
            ConfigError: a sequence has several new tokens, or the workspace is too small.
        """
        from .triton_decode_kernels import decode_attention_kernel

        if batch.max_query_len != 1:
            raise ConfigError(f"{self.name} computes one new token of each sequence, got up to {batch.max_query_len}")
        out = q.new_empty(batch.batch_size, q.shape[1], v.shape[3]) if out is None else out
        options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        self.launch(decode_attention_kernel, query_arguments(q), k, v, batch, out, workspace=workspace, **options)
        return out

    def launch(
        self,
        kernel: Any,
        own: dict[str, Any],
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        *,
        new_rows: int = 0,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        workspace: DecodeWorkspace | None = None,
    ) -> None:
        """Launch a kernel that splits each context, and one that combines where that is another.

        Args:
            kernel: takes what ``arguments`` makes, and ``own``.
            own: its other arguments, by name.
            k, v, batch, out, scale, window, softcap, sinks, workspace: as in ``__call__``.
            new_rows: at the end of each sequence that the kernel does not read from the cache.
        """
        from .triton_decode_kernels import combine_kernel

        batch_size, num_heads, v_head_dim = out.shape
        num_kv_heads = k.shape[2]
        rows = batch.max_end if window is None else min(batch.max_end, window)
        splits = self.num_splits(batch_size, num_kv_heads, rows, out.device)
        if workspace is None and self.workspaces is not None:
            shape = (batch_size, num_heads, num_kv_heads, v_head_dim, batch.max_end, out.device)
            if shape not in self.workspaces:
                self.workspaces[shape] = self.workspace(*shape)
            workspace = self.workspaces[shape]
        if splits > 1:
            workspace = self._workspace(workspace, batch_size, num_heads, num_kv_heads, v_head_dim, splits, out.device)
        arguments, options = self.arguments(
            *(k, v, out, batch.slots_int32, batch.ends_int32, batch.starts_int32),
            workspace=workspace,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            several_splits=splits > 1,
        )
        with torch.cuda.device_of(out):
            kernel[splits, num_kv_heads, batch_size](**arguments, **own, **options)
            if splits > 1 and not self.fused_combine:
                known = {name: arguments[name] for name in combine_kernel.arg_names if name in arguments}
                known |= {"BLOCK_S": _splits_at_once(arguments["BLOCK_DV"]), "NEW": new_rows}
                combine_kernel[num_heads, batch_size](**known, num_splits=splits, **{**options, "num_warps": 4})

    def arguments(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        slots: torch.Tensor,
        ends: torch.Tensor,
        starts: torch.Tensor | None,
        *,
        workspace: DecodeWorkspace | None,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        several_splits: bool = True,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a kernel is launched with, by name, and the options of its compilation; ``query_arguments`` come on top.

        Args:
            k, v, out, workspace, scale, window, softcap, sinks: as in ``__call__``; a workspace unless one program
                takes all of a context.
            slots, ends, starts: ``[batch_size]`` int32; starts may be None.
            several_splits: False where there is one split; then the kernel has no code for several.
        """
        num_heads, head_dim, v_head_dim = out.shape[1], k.shape[3], v.shape[3]
        group = num_heads // k.shape[2]
        # Matrix multiplications take no less than 16.
        block_d, block_dv = max(16, next_power_of_2(head_dim)), max(16, next_power_of_2(v_head_dim))
        # More rows of float32, which are multiplied without tensor cores, do not fit in the registers.
        max_block_n = self.block_n if k.element_size() < 4 else 32
        block_n, num_stages = self._tiles((block_d + block_dv) * k.element_size(), max_block_n, out.device)
        # Scores are kept in powers of two. tanh(x) = 1 - 2 / (exp(2 x) + 1), which no x overflows.
        scale *= LOG2_E
        if softcap is not None:
            scale *= 2 / softcap
        k_address, dtype, k_align = address_of(k)
        v_address, _, v_align = address_of(v)
        arguments = {
            "k_address": k_address,
            "v_address": v_address,
            "slots_ptr": slots,
            "counters_ptr": ends if workspace is None else workspace.counters,
            "out_ptr": out,
            "partials_ptr": out if workspace is None else workspace.partials,
            "ends_ptr": ends,
            "starts_ptr": ends if starts is None else starts,
            "sinks_ptr": out if sinks is None else sinks,
            "out_stride": out.stride(0),
            "out_head_stride": out.stride(1),
            "window": INT32_MAX if window is None else window,
            "k_slot_stride": k.stride(0),
            "k_row_stride": k.stride(1),
            "v_slot_stride": v.stride(0),
            "v_row_stride": v.stride(1),
            "scale": scale,
            "cap": 0.0 if softcap is None else softcap * LOG2_E,
            "K_HEAD_STRIDE": k.stride(2),  # constant, so that the compiler sees the alignment of odd head sizes too
            "V_HEAD_STRIDE": v.stride(2),
            "DTYPE": dtype,
            "ALIGN": min(k_align, v_align),
            "G": group,
            "D": head_dim,
            "DV": v_head_dim,
            "BLOCK_N": block_n,
            # Tensor cores take 16 heads at once, whether or not there are so many; float32 does not go there.
            "BLOCK_G": max(16 if k.element_size() < 4 else 1, next_power_of_2(group)),
            "BLOCK_C": next_power_of_2(group),
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "BLOCK_S": _splits_at_once(next_power_of_2(group) * block_dv),
            "HAS_STARTS": starts is not None,
            "HAS_SOFTCAP": softcap is not None,
            "HAS_SINKS": sinks is not None,
            "SPLIT": several_splits,
            "FUSED": self.fused_combine,
            "STAGES": num_stages,
            "WIDEN": interpreted(),
        }
        pdl = launch_options(self.pdl)
        arguments["PDL"] = pdl.pop("PDL")
        return arguments, {"num_warps": self.num_warps, **pdl}

    def num_splits(self, batch_size: int, num_kv_heads: int, rows: int, device: torch.device) -> int:
        if self.splits is not None:
            return self.splits
        return choose_splits(batch_size, num_kv_heads, rows, _num_sms(device), self.block_n)

    def _workspace(
        self,
        given: DecodeWorkspace | None,
        batch_size: int,
        num_heads: int,
        num_kv_heads: int,
        v_head_dim: int,
        splits: int,
        device: torch.device,
    ) -> DecodeWorkspace:
        num_partials, num_counters = batch_size * splits * num_heads * (v_head_dim + 2), batch_size * num_kv_heads
        if given is None:
            return DecodeWorkspace(
                torch.empty(num_partials, dtype=torch.float32, device=device),
                torch.zeros(num_counters if self.fused_combine else 0, dtype=torch.int32, device=device),
            )
        if given.partials.numel() < num_partials or given.counters.numel() < num_counters:
            raise ConfigError(
                f"{self.name} needs a workspace of {num_partials} partial sums and {num_counters} counters for "
                f"{batch_size} sequences in {splits} splits, got {given.partials.numel()} and {given.counters.numel()}"
            )
        return given

    def _tiles(self, row_bytes: int, max_block_n: int, device: torch.device) -> tuple[int, int]:
        """``block_n`` and ``num_stages``, made smaller until K and V in flight fit; 16 KiB are for all else."""
        room = _shared_bytes(device) - 16 * 1024
        block_n, num_stages = min(self.block_n, max_block_n), self.num_stages
        while num_stages > 2 and num_stages * block_n * row_bytes > room:
            num_stages -= 1
        while block_n > 16 and num_stages * block_n * row_bytes > room:
            block_n //= 2
        return block_n, num_stages


def query_arguments(q: torch.Tensor) -> dict[str, Any]:
    """Arguments of the attention kernel: queries ``[batch_size, num_heads, head_dim]``."""
    return {"q_ptr": q, "q_stride": q.stride(0), "q_head_stride": q.stride(1)}


def _splits_at_once(elements: int) -> int:
    """How many splits of so many elements are combined at a time."""
    return max(1, min(MAX_SPLITS, COMBINED_AT_ONCE // elements))


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else DEFAULT_SMS


@cache
def _shared_bytes(device: torch.device) -> int:
    """Of one program at most."""
    if device.type != "cuda":
        return DEFAULT_SHARED_BYTES
    return block_shared_bytes(device)
