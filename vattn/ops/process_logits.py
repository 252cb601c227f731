"""What a request asks of its logits before a token is chosen: bias, penalties, tokens that may not come."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .triton_support import jit, tl

__all__ = ["ALLOWED", "BIAS", "IN_PROMPT", "PENALTIES", "STOPS", "SamplerState", "process_logits_reference"]

# Bits of ``SamplerState.flags``.
PENALTIES = 1
BIAS = 2
ALLOWED = 4
STOPS = 8

IN_PROMPT = -(2**15)  # the sign bit of a count


@dataclass(frozen=True)
class SamplerState:
    """How the tokens of each slot are chosen; tensors of one device, whose first dimension is ``max_slots``.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int32; 0 keeps all, 1 is greedy.
        top_p: float32; 1 keeps all.
        reach: float32; min-p keeps logits that are at most so far below the largest: ``-temperature * log(min_p)``,
            infinite to keep all. Made once on the host, because logarithms differ from device to device.
        seeds: int64.
        flags: int32, which of the fields below are in use: bits ``PENALTIES``, ``BIAS``, ``ALLOWED``, ``STOPS``.
        repetition: float32, above 0; 1 for none.
        presence, frequency: float32; 0 for none.
        counts: ``[max_slots, vocab]`` int16: the low 15 bits are how often the answer has the token (no more than
            32,767 are counted), the sign bit is whether the prompt has it.
        bias_ids: ``[max_slots, count]`` int32, each token once, -1 for none.
        bias_values: ``[max_slots, count]`` float32, added to these; -inf forbids the token.
        allowed: ``[max_slots, ceil(vocab / 32)]`` int32, a bit for each token that may come, the first one lowest.
        stop_tokens: ``[max_slots, count]`` int32, -1 for none.
        min_rows: int32; stop tokens may not come in rows below it.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    reach: torch.Tensor
    seeds: torch.Tensor
    flags: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    counts: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    allowed: torch.Tensor
    stop_tokens: torch.Tensor
    min_rows: torch.Tensor


def process_logits_reference(
    logits: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, state: SamplerState
) -> torch.Tensor:
    """The logits that tokens are chosen by: those of the model where a slot has no flags.

    In the order of vLLM's sampler (its documentation, ``vllm.v1.sample.sampler``): which tokens are allowed, the
    minimum length and the bias; then the penalties: repetition (Keskar et al. 2019), which divides positive logits of
    tokens of prompt and answer and multiplies the others; frequency times the count in the answer is subtracted; and
    presence, once for each token of the answer (both as in OpenAI's API). Temperature and filters come after that.

    Every operation is rounded to float32 once, so that all devices get the same bits.

    Args:
        logits: ``[batch, vocab]`` bfloat16, float16 or float32; float64 stays float64.
        slots: ``[batch]`` int32.
        rows: ``[batch]`` int32, the position of the token that each row of logits came from.
        state: by slot.

    Returns:
        ``[batch, vocab]`` float32 or float64, NaN for a token that may not come.
    """
    values = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    process_in_place(values, slots, rows, state)
    return values


def process_in_place(values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, state: SamplerState) -> None:
    """``process_logits_reference`` of float32 or float64 logits, which touches only the rows that have flags."""
    flags = flags_in_use(slots, rows, state)
    for i in flags.nonzero()[:, 0].tolist():
        row, slot, flag = values[i], int(slots[i]), int(flags[i])
        if flag & BIAS:
            used = state.bias_ids[slot] >= 0
            ids, bias = state.bias_ids[slot][used].long(), state.bias_values[slot][used]
            row[ids] = torch.where(bias == -torch.inf, torch.nan, row[ids] + bias.to(row.dtype))
        if flag & PENALTIES:
            ids = state.counts[slot].nonzero()[:, 0]
            x, count = row[ids], state.counts[slot, ids].int() & 0x7FFF
            each = (t[slot].to(row.dtype) for t in (state.repetition, state.presence, state.frequency))
            repetition, presence, frequency = each
            x = torch.where(x > 0, x / repetition, x * repetition)
            row[ids] = torch.where(count > 0, x - frequency * count - presence, x)
        if flag & ALLOWED:
            bits = (state.allowed[slot][:, None] >> torch.arange(32, device=row.device)) & 1
            row += 0 / bits.flatten()[: row.numel()].to(row.dtype)  # 0 or NaN; filling by a mask is far slower
        if flag & STOPS:
            ids = state.stop_tokens[slot].long()
            row[ids[ids >= 0]] = torch.nan


def flags_in_use(slots: torch.Tensor, rows: torch.Tensor, state: SamplerState) -> torch.Tensor:
    """``[batch]`` int32: the flags of each slot, without ``STOPS`` where its row is high enough."""
    index = slots.long()
    flags = state.flags[index]
    return torch.where(rows < state.min_rows[index], flags, flags & ~STOPS)


_PENALTIES, _BIAS, _ALLOWED, _STOPS = (tl.constexpr(bit) for bit in (PENALTIES, BIAS, ALLOWED, STOPS))


@jit
def _processed(  # type: ignore[no-untyped-def]
    x, ids, inside, flags, repetition, presence, frequency, counts_ptr, allowed_ptr
):
    """Logits with the penalties of their ids, and NaN where these are not allowed."""
    if flags & _PENALTIES:
        seen = tl.load(counts_ptr + ids, mask=inside, other=0).to(tl.int32)
        count = seen & 0x7FFF
        # A product that is chosen by a condition is not contracted with the subtraction after it, and a division that
        # says how it rounds is not approximated: the host has to get the same bits.
        penalised = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where(seen != 0, penalised, x)
        x -= tl.where(count > 0, count.to(tl.float32) * frequency, 0.0)
        x -= tl.where(count > 0, presence, 0.0)
    if flags & _ALLOWED:
        word = tl.load(allowed_ptr + (ids >> 5), mask=inside, other=0)
        x = tl.where(((word >> (ids & 31)) & 1) != 0, x, float("nan"))
    return x


@jit
def process_row(  # type: ignore[no-untyped-def]
    row_ptr,
    out_ptr,
    slot,
    flags,
    vocab,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    num_biases,
    allowed_ptr,
    num_words,
    stop_tokens_ptr,
    num_stops,
    BIASES: tl.constexpr,
    STOP_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes its row of ``process_logits_reference``, which it may read then."""
    repetition = tl.load(repetition_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    counts_ptr += slot * vocab
    allowed_ptr += slot * num_words
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < vocab
        x = tl.load(row_ptr + ids, mask=inside, other=0.0).to(tl.float32)
        x = _processed(x, ids, inside, flags, repetition, presence, frequency, counts_ptr, allowed_ptr)
        tl.store(out_ptr + ids, x, mask=inside)
    tl.debug_barrier()
    if flags & _BIAS:  # comes before the penalties: these few once more
        place = tl.arange(0, BIASES)
        ids = tl.load(bias_ids_ptr + slot * num_biases + place, mask=place < num_biases, other=-1)
        inside = ids >= 0
        bias = tl.load(bias_values_ptr + slot * num_biases + place, mask=inside, other=0.0)
        x = tl.load(row_ptr + ids, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(bias == float("-inf"), float("nan"), x + bias)
        x = _processed(x, ids, inside, flags, repetition, presence, frequency, counts_ptr, allowed_ptr)
        tl.store(out_ptr + ids, x, mask=inside)
        tl.debug_barrier()
    if flags & _STOPS:
        place = tl.arange(0, STOP_TOKENS)
        ids = tl.load(stop_tokens_ptr + slot * num_stops + place, mask=place < num_stops, other=-1)
        tl.store(out_ptr + ids, tl.full((STOP_TOKENS,), float("nan"), tl.float32), mask=ids >= 0)
        tl.debug_barrier()
