"""The ops around a captured decode step against their references and against plain Python."""

from __future__ import annotations

import math
import os

import pytest
import torch

import vattn.ops.sample_tokens as sample_tokens_module
from vattn.errors import ConfigError
from vattn.ops.advance import advance, advance_reference
from vattn.ops.begin_step import begin_step, begin_step_reference
from vattn.ops.sample_tokens import philox_reference, sample_tokens, sample_tokens_reference, scores_reference
from vattn.triton_support import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


def listed_slots(num_slots, batch, num_padding):
    """Slots in random order, and a scratch slot that every row of padding repeats."""
    order = torch.randperm(num_slots)
    return torch.cat((order[:batch], order[-1:].repeat(num_padding))).int()


# -- begin_step ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "hidden"), [(1, 64), (3, 100), (5, 2500)])
def test_begin_step(device, dtype, batch, hidden):
    slots = listed_slots(9, batch, 3).to(device)
    tokens = torch.randint(0, 50, (9,), dtype=torch.int32, device=device)
    lengths = torch.randint(0, 2**31 - 1, (9,), dtype=torch.int32, device=device)
    embedding = torch.randn(50, hidden + 5).to(device, dtype)[:, :hidden]
    wide = torch.full((batch + 3, hidden + 7), NAN, device=device, dtype=dtype)
    rows, ends = torch.full((2, batch + 3), -5, dtype=torch.int32, device=device)
    begin_step(slots, tokens, lengths, embedding, wide[:, :hidden], rows, ends)
    expected = torch.empty(batch + 3, hidden, device=device, dtype=dtype)
    expected_rows, expected_ends = torch.empty_like(rows), torch.empty_like(ends)
    begin_step_reference(slots, tokens, lengths, embedding, expected, expected_rows, expected_ends)
    assert torch.equal(wide[:, :hidden], expected)
    assert wide[:, hidden:].isnan().all()
    assert torch.equal(rows, expected_rows)
    assert torch.equal(ends, expected_ends)
    for i, slot in enumerate(slots.tolist()):
        assert torch.equal(wide[i, :hidden], embedding[tokens[slot].item()])
        assert rows[i] == lengths[slot]
        assert ends[i] == lengths[slot] + 1


# -- Philox ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (-1, -1, -1, -1), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    """The answers that Random123, its authors' library, is tested with."""
    assert tuple(int(word) for word in philox_reference(torch.tensor(key), *counter)) == expected


def test_philox_is_tritons(device):
    import triton
    import triton.language as tl

    @triton.jit
    def philox_kernel(seed_ptr, row_ptr, out_ptr, COUNT: tl.constexpr):
        ids = tl.arange(0, COUNT)
        first, second, third, fourth = tl.philox(tl.load(seed_ptr), ids, tl.load(row_ptr), 0, 0)
        tl.store(out_ptr + ids, first.to(tl.int64))
        tl.store(out_ptr + COUNT + ids, second.to(tl.int64))
        tl.store(out_ptr + 2 * COUNT + ids, third.to(tl.int64))
        tl.store(out_ptr + 3 * COUNT + ids, fourth.to(tl.int64))

    for low, high in [(-(2**63), -1), (0, 2**31), (2**31, 2**33), (2**60, 2**63 - 1)]:
        seed = torch.randint(low, high, (1,), device=device)
        row = torch.randint(0, 2**31 - 1, (1,), dtype=torch.int32, device=device)
        out = torch.empty(4, 64, dtype=torch.int64, device=device)
        philox_kernel[(1,)](seed, row, out, COUNT=64)
        assert torch.equal(out, torch.stack(philox_reference(seed, torch.arange(64, device=device), row, 0, 0)))


# -- sample_tokens ---------------------------------------------------------------------------------------------------
class Requests:
    """Parameters by slot, one request for each of ``rows``; with a slot more than there are requests."""

    def __init__(self, device, temperature, top_k, top_p, seeds=None):
        count = max(len(each) for each in (temperature, top_k, top_p))
        self.slots = listed_slots(count + 1, count, 0).to(device)
        self.rows = torch.randint(0, 1 << 20, (count,), dtype=torch.int32, device=device)
        index = self.slots.long()

        def by_slot(values, dtype, spare):
            out = torch.full((count + 1,), spare, dtype=dtype, device=device)
            out[index] = torch.tensor(values, dtype=dtype, device=device).expand(count)
            return out

        self.temperature = by_slot(temperature, torch.float32, NAN)
        self.top_k = by_slot(top_k, torch.int32, -1)
        self.top_p = by_slot(top_p, torch.float32, NAN)
        if seeds is None:
            seeds = torch.randint(-(2**63), 2**63 - 1, (count,)).tolist()
        self.seeds = by_slot(seeds, torch.int64, 0)

    @property
    def arguments(self):
        return self.slots, self.rows, self.temperature, self.top_k, self.top_p, self.seeds

    def sample(self, logits, function=sample_tokens):
        out = torch.full((len(self.slots) + 2,), -7, dtype=torch.int32, device=logits.device)
        function(logits, *self.arguments, out[: len(self.slots)])
        assert (out[len(self.slots) :] == -7).all()
        out = out[: len(self.slots)]
        assert ((out >= 0) & (out < logits.shape[1])).all()
        return out

    def check(self, logits):
        """The kernel takes what the reference does, but where float32 cannot tell two scores apart."""
        taken, expected = self.sample(logits), self.sample(logits, sample_tokens_reference)
        if not torch.equal(taken, expected):
            scores = scores_reference(logits, *self.arguments)
            score, best = (scores.gather(-1, ids.long()[:, None])[:, 0] for ids in (taken, expected))
            near = best - score <= 1e-5 * best.abs().clamp(min=1)
            assert ((taken == expected) | near).all(), (taken, expected, score, best)
        return taken


def random_logits(device, dtype, batch, vocab, spread=3.0):
    """Rows of a wider tensor; what lies between them would win."""
    wide = torch.full((batch, vocab + 3), INF)
    wide[:, :vocab] = torch.randn(batch, vocab) * spread
    return wide.to(device, dtype)[:, :vocab]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "block"), [(97, 128), (1000, 256), (5003, 1024), (1, 1)])
def test_sample_tokens(device, monkeypatch, dtype, vocab, block):
    """Greedy, plain, each cut alone and both, and padding; the hot rows draw far down their logits."""
    monkeypatch.setattr(sample_tokens_module, "_BLOCK", block)
    requests = Requests(
        device,
        temperature=[0, 0.7, 100, 100, 0.9, 3, 1e-4, 0],
        top_k=[5, 0, 4, 0, 40, 7, 3, 0],
        top_p=[0.5, 1, 1, 0.004, 0.8, 0.5, 0.9, 1],
    )
    requests.slots = torch.cat((requests.slots, requests.slots[-1:].repeat(2)))
    requests.rows = torch.cat((requests.rows, requests.rows[-1:].repeat(2)))
    logits = random_logits(device, dtype, 10, vocab)
    taken = requests.check(logits)
    assert torch.equal(logits[0, taken[0]], logits[0].max())


def consecutive_floats(dtype, first, count):
    """The ``count`` floats of the dtype from number ``first`` on, counted from zero away."""
    number = torch.arange(first, first + count)
    size = torch.int16 if dtype.itemsize == 2 else torch.int32
    return torch.where(number < 0, -1, 1).to(dtype) * number.abs().to(size).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("around", [0.0, 1.0, -3.0])
def test_thresholds_to_the_last_bit(device, dtype, around):
    """All of the same mass, and the last of the kept has the largest Gumbel but for the first that is cut."""
    if dtype == torch.bfloat16 and around == 0 and device == "cpu":
        pytest.skip("Triton's interpreter reads subnormal bfloat16 wrongly")
    ks = [1, 2, 14, 40, 96, 0, 0, 0, 20, 8]
    ps = [1.0] * 5 + [0.5 / 97, 30.5 / 97, 95.5 / 97, 9.5 / 20, 1.0]
    counts = [1, 2, 14, 40, 96, 1, 31, 96, 10, 8]
    requests = Requests(device, [1e6] * 10, ks, ps)
    seeds = requests.seeds[requests.slots.long()][:, None]
    first = philox_reference(seeds, torch.arange(97, device=device), requests.rows[:, None], 0, 0)[0]
    order = first.argsort(dim=-1, descending=True)
    nearest = torch.tensor(abs(around), dtype=dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int32).item()
    values = consecutive_floats(dtype, (nearest if around >= 0 else -nearest) - 40, 97).flip(0).to(device)
    assert (values.diff() < 0).all()
    logits = torch.empty(10, 97, dtype=dtype, device=device)
    for i, count in enumerate(counts):
        shuffled = torch.cat((order[i, 2 : count + 1], order[i, 1:2], order[i, :1], order[i, count + 1 :]))
        logits[i, shuffled] = values
    assert torch.equal(requests.check(logits).long(), order[:, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_keep_ties(device, dtype):
    """Few kept of many equal, among them zeros of either sign."""
    logits = random_logits(device, dtype, 8, 97, spread=1.0).round_()
    logits[::2, ::2] *= -1
    Requests(device, [10.0] * 8, [1, 3, 20, 50, 0, 0, 60, 10], [1, 1, 1, 1, 0.1, 0.5, 0.5, 0.5]).check(logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 128])
def test_greedy_takes_the_first_of_equals(device, monkeypatch, dtype, block):
    monkeypatch.setattr(sample_tokens_module, "_BLOCK", block)
    logits = random_logits(device, dtype, 4, 97).clamp(max=5)
    for row, ids in enumerate([(96, 3, 50), (17, 16), (95, 31, 96), (40,)]):
        logits[row, list(ids)] = 6
    logits[3] = -0.0
    logits[3, 41:] = 0.0  # equal to -0
    requests = Requests(device, [0.0] * 4, [0, 3, 0, 1], [1, 0.5, 0.9, 1])
    assert requests.sample(logits).tolist() == [3, 16, 31, 0]
    assert requests.sample(logits, sample_tokens_reference).tolist() == [3, 16, 31, 0]


def test_cuts_to_one_and_to_none(device):
    """Top-k of 1, tiny top-p and temperatures are greedy; top-k beyond the vocabulary and top-p of 1 cut nothing."""
    logits = torch.stack([torch.randperm(97) for _ in range(6)]).to(device, torch.float32)
    requests = Requests(device, [1, 50, 1e-4, 1e-40, 100, 1], [1, 0, 0, 0, 0, 1], [1, 1e-30, 1, 1, 0, 0.3])
    assert torch.equal(requests.check(logits).long(), logits.argmax(-1))

    logits /= 30
    plain = Requests(device, [2.0] * 6, [0] * 6, [1.0] * 6)
    expected = plain.check(logits)
    for k, p in [(97, 1.0), (98, 1.0), (2**31 - 1, 1.0), (-3, 1.0), (0, 1.5)]:
        plain.top_k.fill_(k)
        plain.top_p.fill_(p)
        assert torch.equal(plain.check(logits), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(device, monkeypatch, dtype):
    logits = torch.full((10, 97), NAN)
    logits[1] = -INF
    logits[2] = -INF
    logits[2, 60] = -5
    logits[3, 7:9] = torch.tensor([-INF, 1.0])  # the rest NaN
    logits[4, 30] = -INF  # the rest NaN
    logits[5] = torch.randn(97)
    logits[5, 80] = INF
    logits[6, ::2] = torch.randn(49)  # every other NaN
    logits[7] = torch.tensor([-6e4, 6e4, 5e4]).repeat(33)[:97]  # differences beyond float16
    logits[8] = torch.randn(97)
    logits[8, 20:] = -INF
    logits[9, 10:20] = -INF
    logits = logits.to(device, dtype)
    fixed = {0: 0, 2: 60, 3: 8, 4: 30, 5: 80}
    heats = [[0.0] * 10, [1.0] * 10, [1e-4] * 10, [INF] * 10]
    for heat, k, p, block in zip(heats, [0, 0, 30, 0], [1, 1, 0.9, 1], [16, 128, 128, 16], strict=True):
        monkeypatch.setattr(sample_tokens_module, "_BLOCK", block)
        taken = Requests(device, heat, [k], [p]).check(logits).tolist()
        assert {row: taken[row] for row in fixed} == fixed
        assert taken[6] % 2 == 0
        assert taken[7] % 3 == 1 or heat[0] == INF
        assert taken[8] < 20
        assert 10 <= taken[9] < 20


def test_largest_and_smallest_uniforms(device):
    """Tokens whose 24 bits are all ones and all zeros: in float32 the first u would be 1, and its Gumbel infinite."""
    positions, ids = [256704, 696134, 195896, 283144], [9, 94, 92, 62]
    first = philox_reference(torch.tensor(12345), torch.tensor(ids), torch.tensor(positions), 0, 0)[0]
    assert (first >> 8).tolist() == [0xFFFFFF, 0xFFFFFF, 0, 0]
    requests = Requests(device, [1.0] * 4, [0] * 4, [1.0] * 4, seeds=[12345] * 4)
    requests.rows = torch.tensor(positions, dtype=torch.int32, device=device)
    logits = torch.zeros(4, 97, device=device)
    logits[range(4), ids] = -25.0
    assert all(taken != id for taken, id in zip(requests.check(logits).tolist(), ids, strict=True))
    # A Gumbel of 25 log 2 = 17.33, to within the spacing of the scores.
    logits.fill_(-1000.0)
    other = torch.arange(2, device=device)
    logits[other, ids[:2]] = 0.0
    rivals = scores_reference(logits, *requests.arguments)[:2, 0] + 1000
    for shift, wins in [(17.32, True), (17.34, False)]:
        logits[other, 0] = (shift - rivals).float()
        assert [taken == id for taken, id in zip(requests.sample(logits).tolist(), ids[:2], strict=False)] == [wins] * 2


def test_draw_depends_on_seed_and_position_alone(device):
    logits = torch.randn(1, 97, device=device)

    def drawn(batch, at, seed, position):
        requests = Requests(device, [1.0] * batch, [0] * batch, [1.0] * batch)
        requests.seeds[requests.slots[at].long()] = seed
        requests.rows[at] = position
        many = torch.randn(batch, 97, device=device)
        many[at] = logits
        return requests.sample(many)[at].item()

    for seed, position in [(1, 5), (-(2**62), 2**20)]:
        assert len({drawn(batch, at, seed, position) for batch, at in [(1, 0), (2, 1), (4, 2)]}) == 1
    assert len({drawn(1, 0, 1, position) for position in range(12)}) > 1
    assert len({drawn(1, 0, seed, 1) for seed in range(12)}) > 1
    assert len({drawn(1, 0, seed << 32, 1) for seed in range(12)}) > 1


@pytest.mark.parametrize(
    ("temperature", "k", "p", "kept"),
    [
        (1.0, 0, 1.0, {0, 1, 2, 3, 4, 5}),
        (0.5, 0, 1.0, {0, 1, 2, 3, 4, 5}),
        (2.0, 3, 1.0, {1, 3, 4, 5}),  # 4 and 5 are the third largest both
        (1.0, 2, 0.5, {1}),  # 0.4 of the 0.7 left
        (1.0, 0, 0.39, {1}),
        (1.0, 0, 0.41, {1, 3}),
        (1.0, 0, 0.71, {1, 3, 4, 5}),
        (1.0, 5, 0.97, {0, 1, 3, 4, 5}),
        (0.25, 0, 0.75, {1}),  # 0.4^4 to 0.3^4 is 3.2 to 1
    ],
)
def test_reference_draws_the_softmax_of_what_it_keeps(temperature, k, p, kept):
    """Chi-squared over 8,000 draws, a quarter with the seed changing, the rest with the position."""
    probabilities = torch.tensor([0.08, 0.4, 0.02, 0.3, 0.1, 0.1], dtype=torch.float64)
    count = 8000
    logits = probabilities.log().float().expand(count, -1) + 3
    slots = torch.arange(count).clamp(max=count // 4).int()
    rows = torch.arange(count).sub(count // 4).clamp(min=0).int()
    size = count // 4 + 1
    seeds = torch.randint(-(2**63), 2**63 - 1, (1,)) + torch.arange(size)
    out = torch.empty(count, dtype=torch.int32)
    parameters = (torch.full((size,), temperature), torch.full((size,), k, dtype=torch.int32), torch.full((size,), p))
    sample_tokens_reference(logits, slots, rows, *parameters, seeds, out)
    assert set(out.tolist()) == kept
    ids = sorted(kept)
    expected = probabilities[ids] ** (1 / temperature)
    expected *= count / expected.sum()
    chi2 = ((out.long().bincount(minlength=6)[ids] - expected) ** 2 / expected).sum().item()
    freedom = max(1, len(ids) - 1)
    assert chi2 < freedom + 6 * math.sqrt(2 * freedom) + 6  # far beyond one in a hundred thousand


def test_kernel_draws_what_the_reference_keeps(device):
    """By hand: the same small distribution, every cut, ties kept."""
    logits = torch.tensor([0.08, 0.4, 0.02, 0.3, 0.1, 0.1], device=device).log()
    cuts = [(3, 1.0, {1, 3, 4, 5}), (2, 0.5, {1}), (0, 0.71, {1, 3, 4, 5}), (0, 0.41, {1, 3}), (4, 0.75, {1, 3})]
    draws = 4
    requests = Requests(
        device,
        [1.0] * draws * len(cuts),
        [k for k, _, _ in cuts for _ in range(draws)],
        [p for _, p, _ in cuts for _ in range(draws)],
    )
    taken = requests.check(logits.expand(len(requests.slots), -1)).tolist()
    for i, (_, _, kept) in enumerate(cuts):
        assert set(taken[i * draws : (i + 1) * draws]) <= kept


# -- advance ---------------------------------------------------------------------------------------------------------
def advance_by_hand(sampled, slots, tokens, lengths, remaining, stop_tokens, counter, ring):
    step = counter[0] % len(ring)
    before = list(remaining)
    for i, slot in enumerate(slots):
        ring[step][i] = [-1, 0]
        if before[slot] > 0:
            tokens[slot] = sampled[i]
            lengths[slot] += 1
            stop = sampled[i] in [token for token in stop_tokens[slot] if token >= 0]
            remaining[slot] = 0 if stop else before[slot] - 1
            ring[step][i] = [sampled[i], 1 if stop else 2 if remaining[slot] == 0 else 0]
    counter[0] += 1


@pytest.mark.parametrize("function", [advance, advance_reference])
@pytest.mark.parametrize(
    ("batch", "padding", "num_stops", "ring_size"), [(1, 0, 1, 1), (5, 3, 3, 4), (8, 0, 0, 3), (40, 23, 2, 2)]
)
def test_advance(device, function, batch, padding, num_stops, ring_size):
    num_slots, max_batch = batch + 3, batch + padding + 2
    state = [
        torch.randint(0, 6, (num_slots,)),  # tokens
        torch.randint(0, 100, (num_slots,)),  # lengths
        torch.randint(0, 4, (num_slots,)),  # remaining
        torch.randint(-1, 6, (num_slots, num_stops)),
    ]
    state = [each.int().to(device) for each in state]
    counter = torch.tensor([2**33 + 5], device=device)
    ring = torch.full((ring_size, max_batch, 2), -9, dtype=torch.int32, device=device)
    state += [counter, ring]
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
        sampled = torch.randint(0, 6, (len(slots),), dtype=torch.int32)
        function(sampled.to(device), slots.to(device), *state)
        advance_by_hand(sampled.tolist(), slots.tolist(), *by_hand)
        assert [each.tolist() for each in state] == by_hand
    assert counter.item() == 2**33 + 11
    assert (ring[:, batch + padding :] == -9).all()


def test_advance_reasons(device):
    """By hand: goes on, stops, is out of tokens, stops with its last token, was over already."""
    remaining = torch.tensor([5, 5, 1, 1, 0], dtype=torch.int32, device=device)
    tokens, lengths = torch.full((2, 5), 100, dtype=torch.int32, device=device)
    stops = torch.tensor([[9, -1], [-1, 9], [-1, -1], [9, 9], [9, 9]], dtype=torch.int32, device=device)
    sampled = torch.tensor([8, 9, 9, 9, 9], dtype=torch.int32, device=device)
    slots = torch.arange(5, dtype=torch.int32, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    ring = torch.zeros(2, 5, 2, dtype=torch.int32, device=device)
    advance(sampled, slots, tokens, lengths, remaining, stops, counter, ring)
    assert ring[0].tolist() == [[8, 0], [9, 1], [9, 2], [9, 1], [-1, 0]]
    assert remaining.tolist() == [4, 0, 0, 0, 0]
    assert tokens.tolist() == [8, 9, 9, 9, 100]
    assert lengths.tolist() == [101, 101, 101, 101, 100]
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
    ends, out = torch.empty(2, count, dtype=torch.int32, device=device)
    stops = torch.full((count + 1, 2), -1, dtype=torch.int32, device=device)
    ring = torch.zeros(3, count, 2, dtype=torch.int32).pin_memory()

    def fresh():
        state = [torch.full((count + 1,), value, dtype=torch.int32, device=device) for value in (7, 0, 4)]
        return *state, torch.zeros(1, dtype=torch.int64, device=device)

    def step(start, choose, end, state, ring):
        tokens, lengths, remaining, counter = state
        start(requests.slots, tokens, lengths, embedding, residual, requests.rows, ends)
        choose(residual @ head.T, *requests.arguments, out)
        end(out, requests.slots, tokens, lengths, remaining, stops, counter, ring)

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
        begin_step(ints, ints, ints, floats, floats, ints, ints)
    with pytest.raises(ConfigError, match="need CUDA tensors"):
        sample_tokens(floats, ints, ints, floats[0], ints, floats[0], ints.long(), ints)
    with pytest.raises(ConfigError, match="need CUDA tensors"):
        advance(ints, ints, ints, ints, ints, ints[:, None], ints.long(), ints.view(1, 1, 1))
