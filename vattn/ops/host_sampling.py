"""Choosing the next token of every row on the host: what ``sample_tokens`` does on the GPU, by a shorter way.

The same draw as the kernel's, so that a request gets the same tokens wherever it runs. Here a row is worked on alone,
without sorting more of it than a few, and only those of its tokens get random bits that the cuts keep and that can win.
"""

from __future__ import annotations

import numpy as np
import torch

from .philox import first_words
from .process_logits import SamplerState, flags_in_use, process_in_place
from .sample_tokens import MAX_TEMPERATURE, sample_tokens_reference

__all__ = ["sample_tokens_eager"]

_LARGEST_GUMBEL = 17.33  # a little above 25 log 2, that of the largest u
_NEAR_TOP = 1.0  # some within this of the largest go first, and tell how low another may be and still win
_CHUNK = 16384  # tokens hashed at once: their words stay in the core's cache
_GROUPS = 64  # of tokens that share a place in the search for the k-th largest
_BINS, _BINS_PER_NAT = 2048, 64.0  # of logits, in the search for a share of the mass


def sample_tokens_eager(
    logits: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    state: SamplerState,
    out: torch.Tensor,
) -> None:
    """``sample_tokens_reference`` for tensors of any device; on the CPU without sorting whole rows more than it must.

    Logits of float64 are compared as such.
    """
    if logits.device.type != "cpu":
        sample_tokens_reference(logits, slots, rows, state, out)
        return
    slot = slots.long()
    is_flagged = bool(flags_in_use(slots, rows, state).any())
    tensor = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=is_flagged)
    process_in_place(tensor, slots, rows, state)
    values = tensor.numpy()
    heat, k = state.temperature[slot].float().numpy(), state.top_k[slot].numpy()
    reach, p, seed = state.reach[slot].numpy(), state.top_p[slot].double().tolist(), state.seeds[slot].tolist()
    chosen = values.argmax(-1)  # the first NaN where there is one
    scratch = _Scratch(values.shape[1])
    is_drawn = (heat > 0) & (k != 1)
    for i, position in enumerate(rows.tolist()):
        row, ids = values[i], None
        if np.isnan(row[chosen[i]]):
            ids = np.flatnonzero(~np.isnan(row))
            row = row[ids]
            chosen[i] = ids[row.argmax()] if ids.size else -1
        if is_drawn[i] and row.size:
            scaled, kept = _kept(row, heat[i], int(k[i]), p[i], reach[i], scratch)
            if kept is not None:
                ids = kept if ids is None else ids[kept]
            chosen[i] = _draw(scaled, np.arange(row.size) if ids is None else ids, seed[i], position)
    out.copy_(torch.from_numpy(chosen))


class _Scratch:
    """Memory for the largest of what a row needs: taken anew for every row, most of the time went to page faults."""

    def __init__(self, size: int) -> None:
        self.mass, self.bins = np.empty(size), np.empty(size, np.int64)


def _kept(
    row: np.ndarray, heat: np.floating, k: int, p: float, reach: np.floating, scratch: _Scratch
) -> tuple[np.ndarray, np.ndarray | None]:
    """What the cuts keep of a row without NaN: (logits over the temperature, largest 0; places in the row, or all)."""
    top, places = row.max(), None
    threshold = top - reach if reach < np.inf else row.dtype.type(-np.inf)
    if 0 < k < row.size:
        threshold = max(threshold, _kth_largest(row, k))
    if threshold > -np.inf:
        places = np.flatnonzero(row >= threshold)
        row = row[places]
    scaled = _scale(row, top, heat)
    if p < 1:
        kept = np.flatnonzero(row >= _nucleus(row, scaled, p, scratch))
        scaled, places = scaled[kept], kept if places is None else places[kept]
    return scaled, places


def _kth_largest(row: np.ndarray, k: int) -> np.floating:
    """Of groups of tokens the largest each are looked at first: the k-th largest of these is at most the one sought."""
    size = row.size // _GROUPS
    if 2 * k < size:
        largest = row[: size * _GROUPS].reshape(_GROUPS, size).max(0)
        row = row[np.flatnonzero(row >= np.partition(largest, size - k)[size - k])]
    return np.partition(row, row.size - k)[row.size - k]


def _nucleus(row: np.ndarray, scaled: np.ndarray, p: float, scratch: _Scratch) -> np.floating:
    """The lowest logit of the smallest set of largest ones that hold a share ``p`` of the mass."""
    # float64, or the rounding of a hundred thousand additions would move the cut
    mass, above = np.exp(scaled, out=scratch.mass[: row.size], dtype=np.float64), 0.0
    target = p * mass.sum()
    if row.size > _BINS:  # find the bin that the cut is in, and sort only that
        bins = scratch.bins[: row.size]
        bins[:] = np.minimum(scaled * scaled.dtype.type(-_BINS_PER_NAT), _BINS - 1)
        below = np.bincount(bins, mass).cumsum()
        cut = min(np.searchsorted(below, target), below.size - 1)
        above = below[cut - 1] if cut else 0.0
        inside = np.flatnonzero(bins == cut)
        row, mass = row[inside], mass[inside]
    order = np.argsort(-row)
    below = above + mass[order].cumsum()
    return row[order[min(np.searchsorted(below, target), order.size - 1)]]


def _scale(values: np.ndarray, top: np.floating, heat: np.floating) -> np.ndarray:
    zero, hottest = values.dtype.type(0), values.dtype.type(MAX_TEMPERATURE)
    # The largest logit may be infinite, and the temperature may be tiny.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (values - top) / min(heat, hottest)
        return scaled if np.isfinite(top) else np.where(values == top, zero, scaled)


def _draw(scaled: np.ndarray, ids: np.ndarray, seed: int, position: int) -> int:
    """The token of the largest score."""
    if ids.size <= _CHUNK:
        return int(ids[_scores(scaled, first_words(seed, ids, position)).argmax()])
    few = np.flatnonzero(scaled >= -_NEAR_TOP)[:256]
    best = _scores(scaled[few], first_words(seed, ids[few], position)).max()
    able = np.flatnonzero(scaled >= best - _LARGEST_GUMBEL)
    if able.size < ids.size:
        scaled, ids = scaled[able], ids[able]
    # exp(-Gumbel) is -log(u), which is more than 1 - u: few pass even that, and only of these are logarithms taken.
    limits = np.exp(scaled - scaled.dtype.type(best)) * scaled.dtype.type(1.001 * 2**32) + scaled.dtype.type(1024)
    token, best = -1, -np.inf
    for start in range(0, ids.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        words = first_words(seed, ids[part], position)
        passed = np.flatnonzero((2**32 - words).astype(np.float32) <= limits[part])
        if passed.size:
            scores = _scores(scaled[part][passed], words[passed])
            if scores.max() > best:
                token, best = int(ids[part][passed[scores.argmax()]]), scores.max()
    return token


def _scores(scaled: np.ndarray, words: np.ndarray) -> np.ndarray:
    """With a Gumbel number added, in float64, made of 24 of the 32 random bits."""
    uniform = ((words >> 8).astype(np.float64) + 0.5) * 2.0**-24
    return scaled.astype(np.float64) - np.log(-np.log(uniform))
