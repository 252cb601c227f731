"""Rotary embedding, the append and decode attention in one kernel: against the three in float64, over NaNs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vattn.attention import TritonDecodeAttention, get
from vattn.attention.batch import AttentionBatch
from vattn.attention.rope_decode import rope_attention, rope_decode
from vattn.errors import ConfigError
from vattn.ops.rope_append import rope_append_reference, rope_table

NAN = float("nan")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROWS = 300


def case(
    lens: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str, parts: int, norms: bool
) -> SimpleNamespace:
    """The new token of each sequence is its last row; NaN is in it, and in all rows that no query sees."""
    draw = torch.Generator().manual_seed(sum(lens) + heads + head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    slots = torch.randperm(len(lens) + 1, generator=draw)[: len(lens)].int()
    wide = (heads + 2 * kv_heads) * head_dim
    # Partial sums are float32; a whole product has the weights' dtype.
    qkv = random(parts, len(lens), wide + 8) if parts > 1 else random(len(lens), wide + 8).to(dtype)
    qkv = qkv[..., :wide]  # as part of a wider product
    k, v = (torch.full((len(lens) + 1, ROWS, kv_heads, head_dim), NAN, dtype=dtype) for _ in range(2))
    return SimpleNamespace(
        lens=lens,
        head_dim=head_dim,
        random=random,
        device=device,
        dtype=dtype,
        slots=slots,
        rows=torch.tensor(lens, dtype=torch.int32) - 1,
        qkv=qkv,
        norms=tuple(random(head_dim).to(dtype) if norms else None for _ in range(2)),
        k=k,
        v=v,
    )


def check(one: SimpleNamespace, attention: TritonDecodeAttention, table: Any, early: bool, **options: Any) -> None:
    offset, interleaved = options.pop("offset", 0.0), options.pop("interleaved", False)
    starts, window = options.pop("starts", None), options.get("window")
    slots, lens = one.slots.tolist(), one.lens
    for i, (slot, n) in enumerate(zip(slots, lens, strict=True)):
        first = max(starts[i] if starts else 0, n - (window or n))
        for part in (one.k, one.v):
            part[slot, first : n - 1] = one.random(*part[slot, first : n - 1].shape).to(one.dtype)
    rotation = one.norms, 1e-5, offset, interleaved
    cpu = table if isinstance(table, tuple) else (table,)
    wide = tuple(each.double() for each in cpu)
    k, v = one.k.clone(), one.v.clone()
    norms = tuple(None if each is None else each.double() for each in one.norms)
    exact_k, exact_v = k.double(), v.double()
    angles = wide if isinstance(table, tuple) else wide[0]
    args = (one.slots, one.rows, exact_k, exact_v, *norms, *rotation[1:])
    q = rope_append_reference(one.qkv.double(), angles, *args)
    relative = [n - (starts[i] if starts else 0) for i, n in enumerate(lens)]
    batch = AttentionBatch(tuple(slots), (1,) * len(lens), tuple(relative), torch.device("cpu"), starts)
    exact = {name: each.double() if name == "sinks" else each for name, each in options.items()}
    scale = one.head_dim**-0.5
    expected = get("reference")(q, exact_k.nan_to_num(), exact_v.nan_to_num(), batch, scale=scale, **exact)

    move = lambda x: None if x is None else x.to(one.device)  # noqa: E731
    one_batch = AttentionBatch(tuple(slots), (1,) * len(lens), tuple(relative), torch.device(one.device), starts)
    table = tuple(move(each) for each in table) if isinstance(table, tuple) else move(table)
    k, v = move(k), move(v)
    args = (move(one.qkv), table, k, v, *(move(each) for each in one.norms), 1e-5, one_batch, offset, interleaved)
    options = {name: move(each) if name == "sinks" else each for name, each in options.items()}
    out = rope_decode(attention, *args, scale=scale, early=early, **options)
    tolerance = {"rtol": TOLERANCE[one.dtype], "atol": TOLERANCE[one.dtype]}
    assert out.dtype == one.dtype
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance)
    for got, exact_part, before in ((k, exact_k, one.k), (v, exact_v, one.v)):
        where = one.slots.long(), one.rows.long()
        torch.testing.assert_close(got.cpu()[where].double(), exact_part[where], **tolerance)
        got = got.cpu()
        got[where] = before[where]
        assert torch.equal(got.nan_to_num(9.0), before.nan_to_num(9.0)), "another row was written"


def frequencies(half: int) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(half) / half)


EDGES = [1, 2, 16, 17, 18, 33, 64, 65, 66, 129, 200]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("parts", "norms"), [(1, True), (3, False)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "splits", "fused"),
    [(8, 2, 64, 1, True), (4, 4, 128, 3, True), (9, 3, 48, 5, False), (8, 1, 64, None, False)],
)
def test_rope_decode(device, early, dtype, parts, norms, heads, kv_heads, head_dim, splits, fused):
    attention = TritonDecodeAttention(block_n=16 if splits == 3 else 64, splits=splits, fused_combine=fused)
    one = case(EDGES, heads, kv_heads, head_dim, dtype, device, parts, norms)
    check(one, attention, rope_table(frequencies(head_dim // 2), ROWS), early)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (24, 6)])
def test_angles_of_each_token(device, early, interleaved, head_dim, rotary_dim):
    """For a part of the dimensions perhaps, with norms whose weights lack one."""
    one = case([1, 40, 130], 6, 2, head_dim, torch.float32, device, 2, norms=True)
    angles = one.random(3, rotary_dim // 2)
    attention = TritonDecodeAttention(block_n=32, splits=2)
    check(one, attention, (angles.cos(), angles.sin()), early, offset=1.0, interleaved=interleaved)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 33}, {"softcap": 3.0}, {"starts": (0, 64, 199, 3)}, {"sinks": True}]
)
def test_features_of_the_attention(device, early, options):
    one = case([20, 128, 200, 4], 8, 2, 64, torch.float32, device, 1, norms=False)
    if "sinks" in options:
        options = {"sinks": one.random(8) * 2}
    attention = TritonDecodeAttention(block_n=32, splits=3, fused_combine=False)
    check(one, attention, rope_table(frequencies(32), ROWS), early, **options)


@pytest.mark.parametrize(
    ("batch_size", "early", "expected"), [(1, True, True), (1, False, False), (2, True, False), (4, False, True)]
)
def test_where_it_gains(batch_size, early, expected):
    batch = AttentionBatch(tuple(range(batch_size)), (1,) * batch_size, (9,) * batch_size, torch.device("cpu"))
    part = batch, TritonDecodeAttention(pdl=True)
    assert rope_attention([part], early) == (part[1] if expected else None)
    without = TritonDecodeAttention()
    assert rope_attention([(batch, without)], early) == (without if batch_size == 4 else None)
    assert rope_attention([(batch, get("reference"))], early) is None
    assert rope_attention([part, part], early) is None, "prompts beside the sequences"


@pytest.mark.parametrize("shape", [(1, 8), (2, 9)])
def test_angles_that_do_not_fit_are_refused(shape, device):
    batch = AttentionBatch((0, 1), (1, 1), (4, 4), torch.device(device))
    k, v = torch.zeros(2, 2, 8, 1, 16, device=device)
    angles = torch.ones(shape, device=device), torch.ones(shape, device=device)
    with pytest.raises(ConfigError, match=r"cosines and sines \[2, at most 8\]"):
        rope_decode(
            TritonDecodeAttention(), torch.zeros(2, 48, device=device), angles, k, v, None, None, 1e-5, batch, scale=1.0
        )


def test_several_new_tokens_are_refused():
    batch = AttentionBatch((0,), (2,), (4,), torch.device("cpu"))
    k, v = torch.zeros(2, 1, 8, 1, 16)
    with pytest.raises(ConfigError, match="one new token of each sequence, got up to 2"):
        rope_decode(
            TritonDecodeAttention(), torch.zeros(2, 48), torch.zeros(8, 2, 8), k, v, None, None, 1e-5, batch, scale=1.0
        )
