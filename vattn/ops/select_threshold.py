"""How far down a row of logits the kept ones go, without sorting: parts of the sampler's kernel."""

from __future__ import annotations

from .triton_support import jit, tl

__all__ = ["load_block", "measure", "scale", "select_threshold"]


@jit
def load_block(row_ptr, start, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # Beyond the vocabulary as if NaN, which is neither counted nor chosen: it is not >= anything.
    ids = start + tl.arange(0, BLOCK)
    return ids, tl.load(row_ptr + ids, mask=ids < vocab, other=float("nan")).to(tl.float32)


@jit
def scale(x, top, cold):  # type: ignore[no-untyped-def]
    # By the inverse of the temperature: a division of each logit is slow, and has a slower branch for infinities.
    return tl.where(x == top, 0.0, (x - top) * cold)


@jit
def measure(  # type: ignore[no-untyped-def]
    row_ptr, vocab, top, cold, low, middle, high, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """How many of the logits are at or above each of three thresholds, or their mass."""
    at_low = tl.zeros((BLOCK,), tl.float32)
    at_middle = tl.zeros((BLOCK,), tl.float32)
    at_high = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=4):
        _, x = load_block(row_ptr, start, vocab, BLOCK)
        if MASS:
            weight = tl.exp(scale(x, top, cold))
        else:
            weight = tl.full((BLOCK,), 1.0, tl.float32)
        at_low += tl.where(x >= low, weight, 0.0)
        at_middle += tl.where(x >= middle, weight, 0.0)
        at_high += tl.where(x >= high, weight, 0.0)
    return tl.sum(at_low, 0), tl.sum(at_middle, 0), tl.sum(at_high, 0)


@jit
def _value_of(key, dtype: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float whose place in the order of floats is ``key``: -inf for any lower, NaN for any above inf."""
    sign: tl.constexpr = 1 << (BITS - 1)
    bits = tl.where(key >= sign, key - sign, 2 * sign - 1 - key)
    if BITS == 32:
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        x = bits.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return tl.where((key < sign) & (x != x), float("-inf"), x)


@jit
def select_threshold(  # type: ignore[no-untyped-def]
    row_ptr, vocab, top, cold, floor, target, MASS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The highest threshold from ``floor`` on that at least ``target`` of the logits reach: two bits a round."""
    key = tl.full((), 0, tl.int64)
    step = tl.full((), 1 << (BITS - 2), tl.int64)
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    for _ in range(BITS // 2):
        low = _value_of(key + step, dtype, BITS)
        middle = _value_of(key + 2 * step, dtype, BITS)
        high = _value_of(key + 3 * step, dtype, BITS)
        at_low, at_middle, at_high = measure(row_ptr, vocab, top, cold, low, middle, high, MASS, BLOCK)
        digit = tl.where(at_high >= target, 3, tl.where(at_middle >= target, 2, tl.where(at_low >= target, 1, 0)))
        key += digit * step
        step = step // 4
    threshold = _value_of(key, dtype, BITS)
    threshold = tl.where(threshold <= top, threshold, top)  # NaN where the target is nothing
    return tl.where(threshold >= floor, threshold, floor)
