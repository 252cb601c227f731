"""Bias, penalties, masks and minimum lengths: against float64 by hand, and the same bits from kernel and reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.decode_ops import FIELDS, INF, NAN, Requests, plain_sampling

import vattn.ops.sample_tokens as sample_tokens_module
from vattn.ops.host_sampling import sample_tokens_eager
from vattn.ops.process_logits import (
    ALLOWED,
    BIAS,
    IN_PROMPT,
    PENALTIES,
    STOPS,
    flags_in_use,
    process_logits_reference,
    process_row,
)
from vattn.ops.sample_tokens import sample_tokens, sample_tokens_reference
from vattn.ops.triton_support import jit, tl, unavailable

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_triton = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
KERNEL = pytest.param(sample_tokens, marks=needs_triton, id="kernel")
PATHS = [sample_tokens_reference, sample_tokens_eager, KERNEL]


def random_requests(device, count, vocab, temperature=0.8, top_k=0, top_p=1.0):
    """Every combination of flags, with parameters of any size; of few tokens nothing is said."""
    tokens = torch.randn(count, vocab).argsort()
    counts = torch.randint(0, 4, (count, vocab)) * torch.randint(0, 2, (count, vocab))
    counts[:, 0] = 0x7FFF
    counts += IN_PROMPT * (torch.rand(count, vocab) < 0.3)
    bias = torch.randn(count, 5) * 10
    bias[:, 4] = -INF
    bias_ids = tokens[:, :5].clone()
    bias_ids[::3, 2] = -1
    stops = tokens[:, 4:7].clone()
    stops[:, 1] = -1
    requests = Requests(
        device,
        [temperature] * count,
        [top_k],
        [top_p],
        flags=torch.arange(count) % 16,
        repetition=torch.rand(count) * 2 + 0.1,
        presence=torch.randn(count),
        frequency=torch.randn(count),
        counts=counts,
        bias_ids=bias_ids,
        bias_values=bias,
        allowed=torch.randint(-(2**31), 2**31, (count, math.ceil(vocab / 32))),
        stop_tokens=stops,
        min_rows=[0],
    )
    requests.state.min_rows[requests.slots.long()] = requests.rows + torch.randint(0, 2, (count,)).int().to(device)
    return requests


def by_hand(logits, slots, rows, state):
    """In Python's own floats, a token at a time; None for a token that may not come."""
    out = []
    for row, slot, position in zip(logits.double().tolist(), slots.tolist(), rows.tolist(), strict=True):
        flags = state.flags[slot].item()
        bias = dict(zip(state.bias_ids[slot].tolist(), state.bias_values[slot].tolist(), strict=True))
        words, counts = state.allowed[slot].tolist(), state.counts[slot].tolist()
        out.append([])
        for token, x in enumerate(row):
            count, is_seen = counts[token] % 2**15, counts[token] != 0
            forbidden = flags & ALLOWED and not words[token // 32] >> token % 32 & 1
            forbidden |= flags & STOPS and position < state.min_rows[slot] and token in state.stop_tokens[slot].tolist()
            if flags & BIAS and token in bias:
                forbidden |= bias[token] == -INF
                x += bias[token]
            if flags & PENALTIES and is_seen:
                repetition = state.repetition[slot].item()
                x = x / repetition if x > 0 else x * repetition
                x -= state.frequency[slot].item() * count
                x -= state.presence[slot].item() * (count > 0)
            out[-1].append(None if forbidden else x)
    return out


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reference_is_what_it_says(dtype):
    requests = random_requests("cpu", 48, 75)
    logits = (torch.randn(48, 75) * 4).to(dtype)
    before = logits.clone()
    found = process_logits_reference(logits, *requests.arguments)
    assert torch.equal(logits, before)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = by_hand(logits, *requests.arguments)
    num_forbidden = 0
    for row, wanted in zip(found.tolist(), expected, strict=True):
        for x, y in zip(row, wanted, strict=True):
            num_forbidden += y is None
            assert math.isnan(x) if y is None else x == pytest.approx(y, rel=1e-5, abs=1e-5)
    assert 100 < num_forbidden < 1500


if not unavailable():

    @jit
    def process_kernel(
        logits_ptr,
        out_ptr,
        slots_ptr,
        flags_ptr,
        vocab,
        r,
        p,
        f,
        c,
        b,
        v,
        biases,
        a,
        words,
        s,
        stops,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0)
        slot, flags = tl.load(slots_ptr + i), tl.load(flags_ptr + i)
        row, out = logits_ptr + i * vocab, out_ptr + i * vocab
        process_row(row, out, slot, flags, vocab, r, p, f, c, b, v, biases, a, words, s, stops, 8, 4, BLOCK)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "block"), [(75, 128), (75, 16), (64, 64)])
def test_kernel_writes_the_same_bits(device, dtype, vocab, block):
    """No contracted product, no approximate division: a last bit would move draws."""
    requests = random_requests(device, 32, vocab)
    logits = (torch.randn(32, vocab) * 4).to(device, dtype)
    slots, rows, state = requests.arguments
    logits[3, ::5], logits[5, ::7], logits[7, ::3] = NAN, INF, -INF
    out = torch.full((32, vocab), 5.0, device=device)
    tensors = (state.repetition, state.presence, state.frequency, state.counts, state.bias_ids, state.bias_values)
    process_kernel[(32,)](
        logits,
        out,
        slots,
        flags_in_use(slots, rows, state),
        vocab,
        *tensors,
        state.bias_ids.shape[1],
        state.allowed,
        state.allowed.shape[1],
        state.stop_tokens,
        state.stop_tokens.shape[1],
        BLOCK=block,
    )
    expected = process_logits_reference(logits, *requests.arguments)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (0.9, 0, 1.0), (1.5, 9, 0.7)])
def test_all_ways_choose_the_same(device, monkeypatch, dtype, temperature, top_k, top_p):
    count = 16 if top_k else 32  # the interpreter is slow
    monkeypatch.setattr(sample_tokens_module, "_BLOCK", 128)
    requests = random_requests(device, count, 203, temperature, top_k, top_p)
    requests.state.reach[requests.slots[::2].long()] = 3.0
    logits = (torch.randn(count, 203) * 4).to(device, dtype)
    taken = requests.check(logits)
    processed = process_logits_reference(logits, *requests.arguments)
    assert not processed[torch.arange(count), taken.long()].isnan().any()


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_may_come_nothing_does(device, function, temperature):
    """-1 where what is allowed, biased away, to come later or NaN leaves nothing; else no forbidden token ever."""
    vocab, count = 40, 8
    logits = torch.randn(count, vocab, device=device)
    logits[0] = NAN
    logits[1] = NAN
    allowed = torch.zeros(count, 2, dtype=torch.int32)
    allowed[:, 0] = 1 << 7  # token 7, and bits beyond the vocabulary
    allowed[:, 1] = -256
    allowed[3] = 0
    allowed[7, 0] = 1 << 7 | 1 << 9
    logits[4, 7] = NAN
    logits[7, 7] = -INF
    logits[7, 9] = NAN  # of the two that may come: -inf is better than none
    state = plain_sampling(
        count,
        device,
        vocab,
        temperature=temperature,
        flags=[0, PENALTIES, ALLOWED, ALLOWED, ALLOWED, ALLOWED | STOPS, ALLOWED | BIAS, ALLOWED],
        allowed=allowed,
        stop_tokens=[7, -1],
        min_rows=[101],
        bias_ids=[7, -1, -1],
        bias_values=[-INF, 0, 0],
    )
    slots = torch.arange(count, dtype=torch.int32, device=device)
    for position, of_stops in ((100, -1), (101, 7)):
        out = torch.empty(count, dtype=torch.int32, device=device)
        function(logits, slots, torch.full_like(slots, position), state, out)
        assert out.tolist() == [-1, -1, 7, -1, -1, of_stops, -1, 7]


@pytest.mark.parametrize("function", PATHS)
def test_order_by_hand(device, function):
    """Bias first, then repetition, frequency, presence; prompt tokens feel the first penalty only."""
    logits = torch.tensor([[2.0, 3.0, -1.0, 0.5]], device=device)

    def best(flags, **how):
        out = torch.empty(1, dtype=torch.int32, device=device)
        zero = torch.zeros_like(out)
        function(logits, zero, zero, plain_sampling(1, device, 4, flags=flags, **how), out)
        return out.item()

    said = torch.tensor([[0, 1, 0, 0]])
    asked = torch.tensor([[0, IN_PROMPT, 0, 0]])
    assert best(PENALTIES, counts=said, repetition=1.49) == 1  # 2.01
    assert best(PENALTIES, counts=said, repetition=1.51) == 0  # 1.99
    assert best(PENALTIES, counts=asked, repetition=1.51) == 0
    assert best(PENALTIES, counts=asked, presence=100.0, frequency=100.0) == 1
    assert best(PENALTIES, counts=said, presence=1.1) == 0
    assert best(PENALTIES, counts=said * 3, frequency=0.3) == 1  # 2.1
    assert best(PENALTIES, counts=said * 3, frequency=0.35) == 0  # 1.95
    # 3 / 2 + 1.2 stays ahead of 2; (3 + 1.2) / 2 does too; but (3 + 0.9) / 2 does not, where 3 / 2 + 0.9 would.
    bias = {"bias_ids": [1, -1, -1], "bias_values": [0.9, 0, 0]}
    assert best(PENALTIES | BIAS, counts=said, repetition=2.0, **bias) == 0
    assert best(BIAS, counts=said, repetition=2.0, bias_ids=[2, 3, -1], bias_values=[4.1, 1.0, 0]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_same_tokens_on_the_gpu():
    """The kernel there, the short way here: flags of every kind, a vocabulary of several blocks."""
    requests, logits = random_requests("cpu", 32, 20_000), torch.randn(32, 20_000) * 4
    slots, rows, state = requests.arguments
    out = torch.empty(32, dtype=torch.int32)
    sample_tokens_eager(logits, slots, rows, state, out)
    there = replace(state, **{name: getattr(state, name).cuda() for name in FIELDS})
    found = torch.empty(32, dtype=torch.int32, device="cuda")
    sample_tokens(logits.cuda(), slots.cuda(), rows.cuda(), there, found)
    assert torch.equal(found.cpu(), out)
