"""Left padding, soft-capping and sinks: the reference against plain float64 arithmetic, the others against it."""

from __future__ import annotations

import pytest
import torch

from vattn.attention import LEFT_PADDING, SINKS, SOFTCAP, AttentionBatch, PhasedAttention, backends, choose, get
from vattn.errors import ConfigError

HEADS, KV_HEADS, HEAD_DIM, SCALE = 6, 2, 64, 0.3
# (query_lens, seq_lens, starts): decode, whole prefill, chunks of several lengths
LENGTHS = {
    "decode": ([1, 1, 1, 1], [1, 17, 64, 300], [5, 0, 31, 16]),
    "prefill": ([5, 1, 33, 33], [5, 1, 33, 33], [28, 32, 0, 7]),
    "chunk": ([4, 16, 4], [9, 47, 200], [38, 0, 3]),
}
FEATURES = {
    "left padding": {LEFT_PADDING},
    "soft-capping": {SOFTCAP},
    "sinks": {SINKS},
    "all": {LEFT_PADDING, SOFTCAP, SINKS},
    "left padding and sinks": {LEFT_PADDING, SINKS},
}
CASES = [
    pytest.param(backend, features, id=f"{backend.name}-{name}")
    for backend in backends()
    for name, features in FEATURES.items()
    if features <= backend.features
]


def make_case(lengths, features, dtype, device):
    """Random q, k, v in slots out of order, NaN in every row that is not a sequence's; options for the call."""
    query_lens, seq_lens, starts = LENGTHS[lengths]
    starts = starts if LEFT_PADDING in features else [0] * len(starts)
    draw = torch.Generator().manual_seed(len(features) + sum(seq_lens))
    num_slots, rows = len(seq_lens) + 1, max(s + n for s, n in zip(starts, seq_lens, strict=True)) + 3
    memory = torch.randn(num_slots, rows, 2, KV_HEADS, HEAD_DIM, generator=draw)
    slots = torch.randperm(num_slots, generator=draw)[: len(seq_lens)].tolist()
    live = torch.zeros(num_slots, rows, dtype=torch.bool)
    for slot, start, seq_len in zip(slots, starts, seq_lens, strict=True):
        live[slot, start : start + seq_len] = True
    memory[~live] = float("nan")
    memory = memory.to(device, dtype)
    q = torch.randn(sum(query_lens), HEADS, HEAD_DIM, generator=draw).to(device, dtype)
    options = {"scale": SCALE}
    if SOFTCAP in features:
        options["softcap"] = 2.0
    if SINKS in features:
        options["sinks"] = torch.randn(HEADS, generator=draw).to(device)
    batch = AttentionBatch(
        tuple(slots),
        tuple(query_lens),
        tuple(seq_lens),
        torch.device(device),
        tuple(starts) if LEFT_PADDING in features else None,
    )
    return q, memory[:, :, 0], memory[:, :, 1], batch, options


def by_hand(q, k, v, batch, scale, window=None, softcap=None, sinks=None):
    """One query and one head at a time, in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    starts = batch.starts or (0,) * batch.batch_size
    for i, (slot, query_len, seq_len) in enumerate(zip(batch.slots, batch.query_lens, batch.seq_lens, strict=True)):
        for j in range(query_len):
            token, row = batch.query_starts[i] + j, starts[i] + seq_len - query_len + j
            rows = slice(starts[i] if window is None else max(starts[i], row - window + 1), row + 1)
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // k.shape[2])
                scores = (k[slot, rows, kv_head].double() @ q[token, head].double()) * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
                out[token, head] = weights @ v[slot, rows, kv_head].double() / total
    return out


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_reference_is_the_formula(features, lengths, window):
    q, k, v, batch, options = make_case(lengths, features, torch.float64, "cpu")
    out = get("reference")(q, k, v, batch, window=window, **options)
    torch.testing.assert_close(out, by_hand(q, k, v, batch, window=window, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("backend", "features"), CASES)
def test_backend_equals_the_formula(backend, features, lengths, window, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if reason := backend.supports(torch.device(device), dtype, HEAD_DIM):
        pytest.skip(reason)
    q, k, v, batch, options = make_case(lengths, features, dtype, device)
    if not backend.masks_over_read:  # what lies past the end is the cache's to keep clean
        k.nan_to_num_(0.0)
        v.nan_to_num_(0.0)
        # Its kernels load whole tiles: rows for them after the last.
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, backend.over_read_tokens)) for x in (k, v))
    out = backend(q, k, v, batch, window=window, **options)
    assert out.dtype == dtype
    q, k, v, sinks = (x.cpu() if x is not None else None for x in (q, k, v, options.pop("sinks", None)))
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    expected = by_hand(q, k, v, batch, window=window, sinks=sinks, **options)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_choose_asks_for_features():
    assert choose("cpu", torch.float32, 64, features=frozenset({LEFT_PADDING})) is get("sdpa")
    assert choose("cpu", torch.float32, 64, features=frozenset({SINKS})) is get("reference")
    with pytest.raises(ConfigError, match="sdpa: has no alibi"):
        choose("cpu", torch.float32, 64, features=frozenset({"alibi"}))
    assert PhasedAttention(get("sdpa"), get("reference")).features == get("sdpa").features


def test_starts_are_checked():
    with pytest.raises(ConfigError, match="one start"):
        AttentionBatch((0, 1), (1, 1), (4, 4), torch.device("cpu"), (1,))
    with pytest.raises(ConfigError, match="at least 0"):
        AttentionBatch((0, 1), (1, 1), (4, 4), torch.device("cpu"), (1, -1))
