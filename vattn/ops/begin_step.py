"""The start of a decode step: each sequence's next token is looked up, and where it goes in the cache."""

from __future__ import annotations

import torch

from .triton_support import jit, next_power_of_2, require_triton, tl

__all__ = ["begin_step", "begin_step_reference"]

_BLOCK = 1024


def begin_step_reference(
    slots: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    embedding: torch.Tensor,
    residual: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor,
    fed: torch.Tensor,
) -> None:
    """``fed[i] = tokens[slots[i]]``, ``residual[i] = embedding[fed[i]]``, ``rows[i] = lengths[slots[i]]``, ``ends[i] =
    rows[i] + 1``.

    Slots may be listed more than once.

    Args:
        slots: ``[batch]`` int32, the slot of each row of the batch.
        tokens: ``[max_slots]`` int32, the token that each sequence feeds next, an id of the embedding.
        lengths: ``[max_slots]`` int32, how many rows each sequence has in the cache already.
        embedding: ``[vocab, hidden]``.
        residual: ``[batch, hidden]``, written.
        rows: ``[batch]`` int32, written: the row in the cache that the token gets, which is its position too.
        ends: ``[batch]`` int32, written: how many rows attention reads.
        fed: ``[batch]`` int32, written: the token itself, for models that look it up by themselves.
    """
    index = slots.long()
    fed.copy_(tokens[index])
    residual.copy_(embedding[fed.long()])
    rows.copy_(lengths[index])
    ends.copy_(rows + 1)


def begin_step(
    slots: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    embedding: torch.Tensor,
    residual: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor,
    fed: torch.Tensor,
) -> None:
    """``begin_step_reference`` as one kernel; rows of the matrices may be strided, their elements not.

    Raises:
        ConfigError: the tensors are not on a GPU.
    """
    require_triton(slots, tokens, lengths, embedding, residual, rows, ends, fed)
    batch, hidden = residual.shape
    block = min(_BLOCK, next_power_of_2(hidden))
    begin_step_kernel[(batch, -(-hidden // block))](
        slots,
        tokens,
        lengths,
        embedding,
        residual,
        rows,
        ends,
        fed,
        embedding.stride(0),
        residual.stride(0),
        hidden,
        BLOCK=block,
    )


@jit
def begin_step_kernel(  # type: ignore[no-untyped-def]
    slots_ptr,
    tokens_ptr,
    lengths_ptr,
    embedding_ptr,
    residual_ptr,
    rows_ptr,
    ends_ptr,
    fed_ptr,
    embedding_stride,
    residual_stride,
    hidden,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + i).to(tl.int64)
    token = tl.load(tokens_ptr + slot).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(embedding_ptr + token * embedding_stride + columns, mask=inside)
    tl.store(residual_ptr + i * residual_stride + columns, value.to(residual_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        row = tl.load(lengths_ptr + slot)
        tl.store(rows_ptr + i, row)
        tl.store(ends_ptr + i, row + 1)
        tl.store(fed_ptr + i, token.to(tl.int32))
