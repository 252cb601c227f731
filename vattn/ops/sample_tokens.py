"""Choosing the next token of every row on the GPU: greedy, or drawn with temperature, min-p, top-k and top-p."""

from __future__ import annotations

import torch

from .philox import philox_reference
from .process_logits import STOPS, SamplerState, process_logits_reference, process_row
from .select_threshold import load_block, measure, scale, select_threshold
from .triton_support import jit, next_power_of_2, require_triton, tl

__all__ = ["sample_tokens", "sample_tokens_reference", "scores_reference"]

_BLOCK = 8192
_STOPS = tl.constexpr(STOPS)
MAX_TEMPERATURE = 1.0e30  # an infinite one would make NaN of logits of -inf


def scores_reference(
    logits: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    state: SamplerState,
) -> torch.Tensor:
    """What ``sample_tokens_reference`` takes the largest of: ``[batch, vocab]`` float64, NaN for what is not kept."""
    slot = slots.long()
    values = process_logits_reference(logits, slots, rows, state).float()
    values, real = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), ~values.isnan()
    top = values.amax(-1, keepdim=True)
    heat = state.temperature[slot].float()[:, None]
    k = state.top_k[slot].long()[:, None]
    is_drawn = (heat > 0) & (k != 1)
    # The largest logit may be infinite, and the temperature may be tiny: no inf - inf, no overflow of exp.
    scaled = torch.where(values == top, 0.0, (values - top) / heat.clamp(max=MAX_TEMPERATURE))
    scaled = torch.where(is_drawn, scaled, 0.0)

    order = values.argsort(dim=-1, descending=True, stable=True)
    descending = values.gather(-1, order)
    k = torch.where(k > 0, k, values.shape[-1]).clamp(max=values.shape[-1])
    reach = state.reach[slot].float()[:, None]
    lowest = torch.where(reach < torch.inf, top - reach, -torch.inf)  # an infinite logit less an infinite reach is NaN
    threshold = descending.gather(-1, k - 1).maximum(lowest)

    mass = (scaled.double().exp() * (real & (values >= threshold))).gather(-1, order).cumsum(-1)
    p = state.top_p[slot].double()[:, None]
    position = (mass < p * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
    threshold = torch.where(p < 1, descending.gather(-1, position).maximum(threshold), threshold)

    ids = torch.arange(values.shape[-1], device=logits.device)
    first = philox_reference(state.seeds[slot][:, None], ids, rows[:, None], 0, 0)[0]
    uniform = ((first >> 8).double() + 0.5) * 2.0**-24
    drawn = scaled.double() - (-uniform.log()).log()
    drawn = drawn.masked_fill((values < threshold) | (values.isneginf() & ~top.isneginf()), torch.nan)
    return torch.where(is_drawn, drawn, values.double()).masked_fill(~real, torch.nan)


def sample_tokens_reference(
    logits: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    state: SamplerState,
    out: torch.Tensor,
) -> None:
    """The next token of each row, which depends on nothing but the row's logits, parameters, seed and position.

    Logits are first processed, as ``process_logits_reference`` says, where a slot has flags. A row of temperature 0, or
    of a top-k of 1, takes its largest logit, the lowest id among equals. Any other divides its logits by the
    temperature, in float32. Min-p keeps the tokens that are at least that share as likely as the likeliest (Nguyen et
    al., ICLR 2025), top-k those whose logit is at least the k-th largest (Fan et al., ACL 2018), then top-p (Holtzman
    et al., ICLR 2020) the smallest set of largest logits that holds at least that share of the rest's mass. All keep
    ties, so that none depends on an order. From what is kept one token is drawn by the Gumbel-max trick (Gumbel 1954;
    Maddison et al. 2014): the largest ``scaled - log(-log(u))``, where ``u`` is of 24 bits of Philox with the seed as
    its key and ``(token id, position, 0, 0)`` as its counter.

    A logit of NaN is never chosen, nor is a token that may not come. One of -inf is never drawn unless all others are
    out of the question too. Where nothing is left to choose from, -1 stands for a token.

    Args:
        logits: ``[batch, vocab]`` bfloat16, float16 or float32.
        slots: ``[batch]`` int32, may repeat.
        rows: ``[batch]`` int32, the position of the token that each row of logits came from.
        state: by slot.
        out: ``[batch]`` int32, written.
    """
    scores = scores_reference(logits, slots, rows, state)
    ids = torch.arange(scores.shape[-1], device=logits.device)
    best = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(-1, keepdim=True)
    chosen = torch.where(scores == best, ids, ids.numel()).amin(-1)
    out.copy_(torch.where(chosen < ids.numel(), chosen, -1))


def sample_tokens(
    logits: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    state: SamplerState,
    out: torch.Tensor,
) -> None:
    """``sample_tokens_reference`` as one kernel, a program a row; rows of logits may be strided, their elements not.

    A row passes once over its logits if greedy, twice if drawn, and for each of top-k and top-p as many times more as
    its dtype has pairs of bits. A row with flags is first written in float32, and then read as such. Masses are summed
    in float32: where a sum comes within its rounding of ``top_p``, the last of the kept tokens may differ from the
    reference's.

    Raises:
        ConfigError: the tensors are not on a GPU.
    """
    require_triton(logits, slots, rows, state.flags, out)
    if logits.dtype == torch.float64:
        logits = logits.float()
    batch, vocab = logits.shape
    block = min(_BLOCK, next_power_of_2(vocab))
    processed = torch.empty(batch, vocab, dtype=torch.float32, device=logits.device)
    num_biases, num_stops = state.bias_ids.shape[1], state.stop_tokens.shape[1]
    sample_tokens_kernel[(batch,)](
        logits,
        slots,
        rows,
        state.temperature,
        state.top_k,
        state.top_p,
        state.reach,
        state.seeds,
        out,
        logits.stride(0),
        vocab,
        processed,
        state.flags,
        state.min_rows,
        state.repetition,
        state.presence,
        state.frequency,
        state.counts,
        state.bias_ids,
        state.bias_values,
        num_biases,
        state.allowed,
        state.allowed.shape[1],
        state.stop_tokens,
        num_stops,
        BITS=8 * logits.element_size(),
        MAX_TEMPERATURE=MAX_TEMPERATURE,
        BIASES=next_power_of_2(max(1, num_biases)),
        STOP_TOKENS=next_power_of_2(max(1, num_stops)),
        BLOCK=block,
        num_warps=min(32, max(1, block // 256)),  # one program has a multiprocessor to itself
    )


@jit
def _best_of(best, best_id):  # type: ignore[no-untyped-def]
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, best_id, 0x7FFFFFFF), 0)


@jit
def _choose(  # type: ignore[no-untyped-def]
    row_ptr,
    slot,
    vocab,
    position_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    reach_ptr,
    seeds_ptr,
    BITS: tl.constexpr,
    MAX_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token of a row of logits; 0x7FFFFFFF if all are NaN."""
    nothing: tl.constexpr = 0x7FFFFFFF
    heat = tl.load(temperature_ptr + slot)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.full((BLOCK,), nothing, tl.int32)
    for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=4):
        ids, x = load_block(row_ptr, start, vocab, BLOCK)
        better = (x > best) | ((x == x) & (best_id == nothing))
        best = tl.where(better, x, best)
        best_id = tl.where(better, ids, best_id)
    top, token = _best_of(best, best_id)

    k = tl.load(top_k_ptr + slot)
    if (heat > 0) & (k != 1) & (token != nothing):
        cold = 1.0 / tl.minimum(heat, MAX_TEMPERATURE)
        p = tl.load(top_p_ptr + slot)
        seed = tl.load(seeds_ptr + slot)
        position = tl.load(position_ptr)
        reach = tl.load(reach_ptr + slot)
        threshold = tl.where(reach < float("inf"), top - reach, float("-inf"))
        if (k > 0) & (k < vocab):
            threshold = select_threshold(row_ptr, vocab, top, cold, threshold, k.to(tl.float32), False, BITS, BLOCK)
        if p < 1:
            mass, _, _ = measure(row_ptr, vocab, top, cold, threshold, top, top, True, BLOCK)
            threshold = select_threshold(row_ptr, vocab, top, cold, threshold, p * mass, True, BITS, BLOCK)

        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_id = tl.full((BLOCK,), nothing, tl.int32)
        for start in range(0, vocab, BLOCK):
            ids, x = load_block(row_ptr, start, vocab, BLOCK)
            bits, _, _, _ = tl.philox(seed, ids, position, 0, 0)
            integer = (bits >> 8).to(tl.int32).to(tl.float32)
            # A float32 has no room for the half above 1/2, and would make 1 of the largest u, infinite a Gumbel.
            # 1 - u, however, is exact there: -log(u) is corrected by what the rounding added to u.
            u = (integer + 0.5) * 5.9604644775390625e-08
            rest = ((16777215.0 - integer) + 0.5) * 5.9604644775390625e-08
            exponential = (rest - (1.0 - u)) - tl.log(u)
            score = scale(x, top, cold) - tl.log(exponential)
            better = (x >= threshold) & ((score > best) | (best_id == nothing))
            best = tl.where(better, score, best)
            best_id = tl.where(better, ids, best_id)
        _, token = _best_of(best, best_id)
    return token


@jit
def sample_tokens_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    slots_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    reach_ptr,
    seeds_ptr,
    out_ptr,
    logits_stride,
    vocab,
    processed_ptr,
    flags_ptr,
    min_rows_ptr,
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
    BITS: tl.constexpr,
    MAX_TEMPERATURE: tl.constexpr,
    BIASES: tl.constexpr,
    STOP_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i * logits_stride
    slot = tl.load(slots_ptr + i).to(tl.int64)
    flags = tl.load(flags_ptr + slot)
    if flags != 0:
        flags = tl.where(tl.load(rows_ptr + i) < tl.load(min_rows_ptr + slot), flags, flags & ~_STOPS)
    # Two ways, because a row is read in its own dtype, and most have no flags.
    if flags == 0:
        token = _choose(
            row_ptr,
            slot,
            vocab,
            rows_ptr + i,
            temperature_ptr,
            top_k_ptr,
            top_p_ptr,
            reach_ptr,
            seeds_ptr,
            BITS,
            MAX_TEMPERATURE,
            BLOCK,
        )
    else:
        out_row_ptr = processed_ptr + i * vocab
        process_row(
            row_ptr,
            out_row_ptr,
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
            BIASES,
            STOP_TOKENS,
            BLOCK,
        )
        token = _choose(
            out_row_ptr,
            slot,
            vocab,
            rows_ptr + i,
            temperature_ptr,
            top_k_ptr,
            top_p_ptr,
            reach_ptr,
            seeds_ptr,
            32,
            MAX_TEMPERATURE,
            BLOCK,
        )
    tl.store(out_ptr + i, tl.where(token == 0x7FFFFFFF, -1, token))
