"""Sampling in a captured step: the kernel against its reference, the reference against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.decode_ops import INF, NAN, Requests, plain_sampling

import vattn.ops.sample_tokens as sample_tokens_module
from vattn.ops.host_sampling import sample_tokens_eager
from vattn.ops.philox import first_words, philox_reference
from vattn.ops.sample_tokens import sample_tokens_reference, scores_reference
from vattn.ops.triton_support import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


def test_first_words_on_the_host():
    """Keys, positions and ids of every size, of either integer type; what is given is not changed."""
    for high in (2, 2**20, 2**31, 2**32):
        seed, position = torch.randint(-(2**63), 2**63 - 1, (1,)), torch.randint(0, high, (1,)).item()
        ids = torch.randint(0, high, (200,))
        given = ids.numpy().astype("uint32" if high > 2**31 else "int32")
        before = given.copy()
        words = first_words(seed.item(), given, position)
        assert words.astype("int64").tolist() == philox_reference(seed, ids, position, 0, 0)[0].tolist()
        assert (given == before).all()


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
    seeds = requests.state.seeds[requests.slots.long()][:, None]
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
        plain.state.top_k.fill_(k)
        plain.state.top_p.fill_(p)
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
    fixed = {0: -1, 2: 60, 3: 8, 4: 30, 5: 80}
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
        requests.state.seeds[requests.slots[at].long()] = seed
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
@pytest.mark.parametrize("function", [sample_tokens_reference, sample_tokens_eager])
def test_draws_the_softmax_of_what_it_keeps(function, temperature, k, p, kept):
    """Chi-squared over 8,000 draws, a quarter with the seed changing, the rest with the position."""
    probabilities = torch.tensor([0.08, 0.4, 0.02, 0.3, 0.1, 0.1], dtype=torch.float64)
    count = 8000
    logits = probabilities.log().float().expand(count, -1) + 3
    slots = torch.arange(count).clamp(max=count // 4).int()
    rows = torch.arange(count).sub(count // 4).clamp(min=0).int()
    size = count // 4 + 1
    seeds = torch.randint(-(2**63), 2**63 - 1, (1,)) + torch.arange(size)
    out = torch.empty(count, dtype=torch.int32)
    function(
        logits, slots, rows, plain_sampling(size, "cpu", temperature=temperature, top_k=k, top_p=p, seeds=seeds), out
    )
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
