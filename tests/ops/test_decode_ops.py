"""The state around a captured decode step: what it reads at its start and writes at its end."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.decode_ops import NAN, Requests, listed_slots, plain_sampling

from vattn.errors import ConfigError
from vattn.ops.advance import advance, advance_reference
from vattn.ops.begin_step import begin_step, begin_step_reference
from vattn.ops.sample_tokens import sample_tokens, sample_tokens_reference
from vattn.ops.triton_support import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# -- begin_step ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "hidden"), [(1, 64), (3, 100), (5, 2500)])
def test_begin_step(device, dtype, batch, hidden):
    slots = listed_slots(9, batch, 3).to(device)
    tokens = torch.randint(0, 50, (9,), dtype=torch.int32, device=device)
    lengths = torch.randint(0, 2**31 - 1, (9,), dtype=torch.int32, device=device)
    embedding = torch.randn(50, hidden + 5).to(device, dtype)[:, :hidden]
    wide = torch.full((batch + 3, hidden + 7), NAN, device=device, dtype=dtype)
    rows, ends, fed = torch.full((3, batch + 3), -5, dtype=torch.int32, device=device)
    begin_step(slots, tokens, lengths, embedding, wide[:, :hidden], rows, ends, fed)
    expected = torch.empty(batch + 3, hidden, device=device, dtype=dtype)
    expected_rows, expected_ends, expected_fed = (torch.empty_like(each) for each in (rows, ends, fed))
    begin_step_reference(slots, tokens, lengths, embedding, expected, expected_rows, expected_ends, expected_fed)
    assert torch.equal(wide[:, :hidden], expected)
    assert wide[:, hidden:].isnan().all()
    assert torch.equal(rows, expected_rows)
    assert torch.equal(ends, expected_ends)
    assert torch.equal(fed, expected_fed)
    for i, slot in enumerate(slots.tolist()):
        assert torch.equal(wide[i, :hidden], embedding[tokens[slot].item()])
        assert rows[i] == lengths[slot]
        assert ends[i] == lengths[slot] + 1
        assert fed[i] == tokens[slot]


def test_begin_step_without_embeddings(device):
    """A column of zeros for a model that looks tokens up itself: one number, expanded."""
    slots, tokens, lengths = (
        torch.tensor(each, dtype=torch.int32, device=device) for each in ([2, 0], [5, 6, 7], [1, 2, 3])
    )
    rows, ends, fed = torch.full((3, 2), -5, dtype=torch.int32, device=device)
    residual = torch.full((2, 1), NAN, device=device)
    begin_step(slots, tokens, lengths, torch.zeros(1, 1, device=device).expand(50, 1), residual, rows, ends, fed)
    assert [each.tolist() for each in (rows, ends, fed, residual)] == [[3, 1], [4, 2], [7, 5], [[0.0], [0.0]]]


# -- advance ---------------------------------------------------------------------------------------------------------
def advance_by_hand(sampled, slots, tokens, lengths, remaining, stop_tokens, flags, counts, counter, ring):
    step = counter[0] % len(ring)
    before = list(remaining)
    for i, slot in enumerate(slots):
        ring[step][i] = [-1, 0]
        if before[slot] > 0:
            lengths[slot] += 1
            if sampled[i] < 0:
                remaining[slot] = 0
                ring[step][i] = [-1, 3]
                continue
            tokens[slot] = sampled[i]
            stop = sampled[i] in [token for token in stop_tokens[slot] if token >= 0]
            remaining[slot] = 0 if stop else before[slot] - 1
            ring[step][i] = [sampled[i], 1 if stop else 2 if remaining[slot] == 0 else 0]
            if flags[slot] % 2 and counts[slot][sampled[i]] not in (-1, 32767):
                counts[slot][sampled[i]] += 1
    counter[0] += 1


@pytest.mark.parametrize("function", [advance, advance_reference])
@pytest.mark.parametrize(
    ("batch", "padding", "num_stops", "ring_size"), [(1, 0, 1, 1), (5, 3, 3, 4), (8, 0, 0, 3), (40, 23, 16, 2)]
)
def test_advance(device, function, batch, padding, num_stops, ring_size):
    """Counts are near zero, near their largest, and with the bit of the prompt."""
    num_slots, max_batch = batch + 3, batch + padding + 2
    near = torch.tensor([0, -(2**15), 32766, -2])  # one more is the largest, alone and with the prompt's bit
    state = [
        torch.randint(0, 6, (num_slots,)),  # tokens
        torch.randint(0, 100, (num_slots,)),  # lengths
        torch.randint(0, 4, (num_slots,)),  # remaining
        torch.randint(-1, 6, (num_slots, num_stops)),
        torch.randint(0, 16, (num_slots,)),  # flags
    ]
    counts = near[torch.randint(0, 4, (num_slots, 6))].short()
    counter = torch.tensor([2**33 + 5])
    ring = torch.full((ring_size, max_batch, 2), -9, dtype=torch.int32)
    state = [each.to(device) for each in (*(each.int() for each in state), counts, counter, ring)]
    counter, ring = state[-2:]
    by_hand = [each.tolist() for each in state]
    for step in range(6):
        slots = listed_slots(num_slots, batch, padding)
        scratch = slots[-1].item() if padding else None
        if padding:
            state[2][scratch] = 0
            by_hand[2][scratch] = 0
        if step == 3:
            state[2].fill_(3)
            by_hand[2] = [3] * num_slots
            slots = slots[:batch]
        sampled = torch.randint(-1, 6, (len(slots),), dtype=torch.int32)
        function(sampled.to(device), slots.to(device), *state)
        advance_by_hand(sampled.tolist(), slots.tolist(), *by_hand)
        assert [each.tolist() for each in state] == by_hand
    assert counter.item() == 2**33 + 11
    assert (ring[:, batch + padding :] == -9).all()


def test_advance_reasons(device):
    """By hand: goes on, stops, is out of tokens, stops with its last token, was over already, could get none."""
    remaining = torch.tensor([5, 5, 1, 1, 0, 5], dtype=torch.int32, device=device)
    tokens, lengths = torch.full((2, 6), 100, dtype=torch.int32, device=device)
    stops = torch.tensor([[9, -1], [-1, 9], [-1, -1], [9, 9], [9, 9], [-1, 9]], dtype=torch.int32, device=device)
    sampled = torch.tensor([8, 9, 9, 9, 9, -1], dtype=torch.int32, device=device)
    slots = torch.arange(6, dtype=torch.int32, device=device)
    flags = torch.ones(6, dtype=torch.int32, device=device)
    counts = torch.zeros(6, 10, dtype=torch.int16, device=device)
    counts[0, 8] = -(2**15)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    ring = torch.zeros(2, 6, 2, dtype=torch.int32, device=device)
    advance(sampled, slots, tokens, lengths, remaining, stops, flags, counts, counter, ring)
    assert ring[0].tolist() == [[8, 0], [9, 1], [9, 2], [9, 1], [-1, 0], [-1, 3]]
    assert remaining.tolist() == [4, 0, 0, 0, 0, 0]
    assert tokens.tolist() == [8, 9, 9, 9, 100, 100]
    assert lengths.tolist() == [101, 101, 101, 101, 100, 101]
    assert counts[0, 8] == 1 - 2**15
    assert counts[1:4, 9].tolist() == [1, 1, 1]
    assert counts.count_nonzero() == 4
    assert not ring[1].any()


@pytest.mark.gpu
def test_captured_step_reports_to_pinned_memory():
    """The three ops in one CUDA graph, replayed; the ring is host memory."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = "cuda"
    requests = Requests(device, [0, 0.8, 0.8, 0.8], [0, 0, 20, 50], [1, 1, 1, 0.9])
    count, vocab = 4, 5003
    head, embedding = (torch.randn(vocab, 64, device=device) for _ in range(2))
    residual = torch.empty(count, 64, device=device)
    ends, fed, out = torch.empty(3, count, dtype=torch.int32, device=device)
    stops = torch.full((count + 1, 2), -1, dtype=torch.int32, device=device)
    ring = torch.zeros(3, count, 2, dtype=torch.int32).pin_memory()
    flags, counts = requests.state.flags, requests.state.counts

    def fresh():
        state = [torch.full((count + 1,), value, dtype=torch.int32, device=device) for value in (7, 0, 4)]
        return *state, torch.zeros(1, dtype=torch.int64, device=device)

    def step(start, choose, end, state, ring):
        tokens, lengths, remaining, counter = state
        start(requests.slots, tokens, lengths, embedding, residual, requests.rows, ends, fed)
        choose(residual @ head.T, *requests.arguments, out)
        end(out, requests.slots, tokens, lengths, remaining, stops, flags, counts, counter, ring)

    step(begin_step, sample_tokens, advance, fresh(), ring)  # compiled before the capture
    state, graph = fresh(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(begin_step, sample_tokens, advance, state, ring)
    expected_state, expected_ring = fresh(), torch.zeros_like(ring)
    for _ in range(6):
        graph.replay()
        torch.cuda.synchronize()
        step(begin_step_reference, sample_tokens_reference, advance_reference, expected_state, expected_ring)
        assert torch.equal(ring, expected_ring)
    for one, other in zip(state, expected_state, strict=True):
        assert torch.equal(one, other)


def test_without_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    ints, floats = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 8)
    with pytest.raises(ConfigError, match="need CUDA tensors"):
        begin_step(ints, ints, ints, floats, floats, ints, ints, ints)
    with pytest.raises(ConfigError, match="need CUDA tensors"):
        sample_tokens(floats, ints, ints, plain_sampling(1, "cpu", 8), ints)
    with pytest.raises(ConfigError, match="need CUDA tensors"):
        advance(ints, ints, ints, ints, ints, ints[:, None], ints, ints[:, None], ints.long(), ints.view(1, 1, 1))
