"""Choosing the next token of every row on the host: what ``sample_tokens`` does on the GPU, by a shorter way.

The same draw as the kernel's, so that a request gets the same tokens wherever it runs. Here a row is worked on alone,
and few of its tokens get random bits: those that the cuts keep and that can still win.
"""

from __future__ import annotations

import numpy as np
import torch

from .philox import philox_words
from .process_logits import SamplerState, flags_in_use, process_logits_reference, token_of_none
from .sample_tokens import MAX_TEMPERATURE, sample_tokens_reference

__all__ = ["sample_tokens_eager"]

_LARGEST_GUMBEL = 17.33  # a little above 25 log 2, that of the largest u
_NEAR_TOP = 1.0  # some within this of the largest go first, and tell how low another may be and still win
_CHUNK = 8192  # tokens hashed at once: their words stay in the core's cache


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
    flagged = flags_in_use(slots, rows, state).nonzero()[:, 0]
    tensor = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=len(flagged) > 0)
    if len(flagged):
        tensor[flagged] = process_logits_reference(logits[flagged], slots[flagged], rows[flagged], state)
    values = tensor.numpy()
    heat, k = state.temperature[slot].float().numpy(), state.top_k[slot].numpy()
    reach, p, seed = state.reach[slot].numpy(), state.top_p[slot].double().tolist(), state.seeds[slot].tolist()
    none = token_of_none(slots, rows, state).tolist()
    chosen = values.argmax(-1)  # the first NaN where there is one
    is_drawn = (heat > 0) & (k != 1)
    for i, position in enumerate(rows.tolist()):
        row, ids = values[i], None
        if np.isnan(row[chosen[i]]):
            ids = np.flatnonzero(~np.isnan(row))
            row = row[ids]
            chosen[i] = ids[row.argmax()] if ids.size else none[i]
        if is_drawn[i] and row.size:
            scaled, kept = _kept(row, heat[i], int(k[i]), p[i], reach[i])
            chosen[i] = _draw(scaled, kept if ids is None else ids[kept], seed[i], position)
    out.copy_(torch.from_numpy(chosen))


def _kept(row: np.ndarray, heat: np.floating, k: int, p: float, reach: np.floating) -> tuple[np.ndarray, np.ndarray]:
    """What the cuts keep of a row without NaN: (logits over the temperature, largest 0; places in the row)."""
    top = row.max()
    threshold = np.partition(row, row.size - k)[row.size - k] if 0 < k < row.size else row.dtype.type(-np.inf)
    if reach < np.inf:
        threshold = max(threshold, top - reach)
    if p < 1:
        descending = np.sort(row[row >= threshold])[::-1]
        # float64, or the rounding of a hundred thousand additions would move the cut
        mass = np.exp(_scale(descending, top, heat).astype(np.float64)).cumsum()
        threshold = descending[min(np.searchsorted(mass, p * mass[-1]), mass.size - 1)]
    places = np.flatnonzero((row >= threshold) & ((row > -np.inf) | np.isneginf(top)))
    return _scale(row[places], top, heat), places


def _scale(values: np.ndarray, top: np.floating, heat: np.floating) -> np.ndarray:
    zero, hottest = values.dtype.type(0), values.dtype.type(MAX_TEMPERATURE)
    # The largest logit may be infinite, and the temperature may be tiny.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(values == top, zero, (values - top) / min(heat, hottest))


def _draw(scaled: np.ndarray, ids: np.ndarray, seed: int, position: int) -> int:
    """The token of the largest score."""
    if ids.size > _CHUNK:
        few = np.flatnonzero(scaled >= -_NEAR_TOP)[:256]
        best = _scores(scaled[few], ids[few], seed, position).max()
        able = np.flatnonzero(scaled >= best - _LARGEST_GUMBEL)
        scaled, ids = scaled[able], ids[able]
    return int(ids[_scores(scaled, ids, seed, position).argmax()])


def _scores(scaled: np.ndarray, ids: np.ndarray, seed: int, position: int) -> np.ndarray:
    """With a Gumbel number added, in float64."""
    uniform = np.empty(ids.size)
    for start in range(0, ids.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        # Arrays, not numpy's scalars, which would warn where a product wraps.
        counter = (ids[part], np.array([position]), *np.zeros((2, 1), np.int64))
        uniform[part] = philox_words(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, *counter)[0] >> 8
    uniform += 0.5
    uniform *= 2.0**-24
    return scaled.astype(np.float64) - np.log(-np.log(uniform))
