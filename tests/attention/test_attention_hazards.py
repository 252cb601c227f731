"""What lies past the end of a sequence neither faults nor shows: every backend, in a cache with exactly its margin.

After the pages that a backend's declaration grants come unmapped ones. Where the backend masks what it reads past the
end, every byte there is NaN. Where it does not, NaNs lie wherever a cache in use can leave them: in pages that came
from a released sequence, in rows that this one had before it was truncated, in its neighbour's rows. Cleaning up is
then the cache's business.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from vattn import KVCache, KVLayout
from vattn.attention import AttentionBackend, AttentionBatch, backends, get
from vattn.driver.cuda import unavailable

NAN = float("nan")
MAX_SEQ_LEN = 1088
EDGES = [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 175, 176, 177, 1023, 1024, 1025, MAX_SEQ_LEN]
LENGTHS = EDGES + random.Random(20).sample(range(1, MAX_SEQ_LEN), 7)
WINDOW = 20
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


class WholeTiles:
    """Reads whole tiles and hides only their scores, as FlashAttention-3 does: it needs the cache's help."""

    name = "whole-tiles"
    features: frozenset[str] = frozenset()
    over_read_tokens = 127
    masks_over_read = False

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        for i, (slot, query_len, seq_len) in enumerate(zip(batch.slots, batch.query_lens, batch.seq_lens, strict=True)):
            new = slice(batch.query_starts[i], batch.query_starts[i] + query_len)
            rows = torch.arange(-(-seq_len // 128) * 128, device=q.device)
            # Beyond max_seq_len too, which a slice would not reach.
            shape, strides = (len(rows), *k.shape[2:]), k.stride()[1:]
            keys, values = (x.as_strided(shape, strides, x[slot].storage_offset()).transpose(0, 1) for x in (k, v))
            query_rows = torch.arange(seq_len - query_len, seq_len, device=q.device)[:, None]
            hidden = rows > query_rows
            if window is not None:
                hidden = hidden | (rows <= query_rows - window)
            group = q.shape[1] // k.shape[2]
            keys, values = keys.float(), values.float()
            scores = q[new].transpose(0, 1).float() @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[new] = (weights @ values.repeat_interleave(group, 0)).transpose(0, 1).to(q.dtype)
        return out


@dataclass(frozen=True)
class Case:
    """A device with its dtype; head counts and layers that put about 16 to 128 tokens in a page of it."""

    device: str
    dtype: torch.dtype
    page_bytes: int | None
    num_kv_heads: dict[str, int]
    num_layers: dict[str, int]
    memory_limit: int

    def layout(self, order: str, head_dim: int) -> KVLayout:
        return KVLayout(self.num_layers[order], self.num_kv_heads[order], head_dim, MAX_SEQ_LEN, self.dtype, order)


HOST = Case("cpu", torch.float32, 16384, {"token": 1, "layer": 1}, {"token": 2, "layer": 2}, 2**28)
GPU_HEADS, GPU_LAYERS = {"token": 8, "layer": 64}, {"token": 32, "layer": 2}
# with head_dim; to the backends that run on the CPU 128 is a number like 64
CASES = [pytest.param((HOST, head_dim), id=f"cpu-float32-{head_dim}") for head_dim in (64, 80)] + [
    pytest.param(
        (Case("cuda", dtype, None, GPU_HEADS, GPU_LAYERS, 2**33), head_dim),
        id=f"cuda-{str(dtype).removeprefix('torch.')}-{head_dim}",
        marks=pytest.mark.gpu,
    )
    for dtype, head_dim in (
        (torch.bfloat16, 64),
        (torch.bfloat16, 80),
        (torch.bfloat16, 128),
        (torch.float16, 128),  # of one size, so its tiles are the same
    )
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Case, int]:
    if request.param[0].device == "cuda" and (reason := unavailable()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=[*backends(), WholeTiles()], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return request.param


@pytest.fixture(params=["token", "layer"])
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cache(
    backend: AttentionBackend, case: tuple[Case, int], order: str, make_cache: Callable[..., KVCache]
) -> Iterator[KVCache]:
    """Granting the backend what it declares, and its free pages full of NaN."""
    setting, head_dim = case
    if reason := backend.supports(torch.device(setting.device), setting.dtype, head_dim):
        pytest.skip(reason)
    cache = make_cache(
        setting.layout(order, head_dim),
        10,
        setting.device,
        setting.memory_limit,
        page_bytes=setting.page_bytes,
        over_read_tokens=backend.over_read_tokens,
        over_read_masked=backend.masks_over_read,
    )
    for slot in [cache.acquire() for _ in range(10)]:
        cache.ensure(slot, MAX_SEQ_LEN)
        poison(cache, slot)
        cache.release(slot)
    yield cache
    cache.check_integrity()


def used(cache: KVCache) -> tuple[int, ...]:
    """The layers that are computed: what lies in the others, mapped with them, stays NaN or zero."""
    return tuple({0, cache.layout.num_layers - 1})


def poison(cache: KVCache, slot: int) -> None:
    """NaN in every row of the sequence, in the layers that are computed and one that is not."""
    for layer in {*used(cache), cache.layout.num_layers // 2}:
        for rows in cache.rows(slot, layer):
            rows.fill_(NAN)


def poison_past(cache: KVCache, slot: int, seq_len: int) -> None:
    """NaN in every byte mapped behind the sequence, to the end of its last page; after that nothing must be mapped."""
    (group,) = cache.layout.groups
    plan = cache.layout.plan(group, cache.max_slots, cache.page_bytes, cache.over_read_tokens)
    view, size = cache.k(0), cache.layout.dtype.itemsize
    base = view.untyped_storage().data_ptr()
    for lane in plan.lanes:
        first = lane.slot_offset(slot)
        num_pages = -(-(seq_len + cache.over_read_tokens) * lane.row_bytes // cache.page_bytes)
        pages = range(base + first, base + first + lane.slot_stride_bytes, cache.page_bytes)
        mapped = [address in cache.driver.book.mappings for address in pages[: num_pages + 1]]
        assert mapped == ([True] * num_pages + [False])[: len(pages)]
        start, end = seq_len * lane.row_bytes // size, num_pages * cache.page_bytes // size
        view.as_strided((end - start,), (1,), first // size + start).fill_(NAN)


def fill(cache: KVCache, slots: Sequence[int], lengths: Sequence[int], backend: AttentionBackend) -> None:
    """Sequences of random rows with as much NaN behind them as the contract allows, in slots with nothing parked."""
    cache.trim(cache.stats().physical_bytes)  # what released sequences left is free now, with what is in it: NaN
    for slot, seq_len in zip(slots, lengths, strict=True):
        longer = min(seq_len + 70, MAX_SEQ_LEN)
        cache.ensure(slot, longer)
        poison(cache, slot)
        cache.truncate(slot, seq_len // 2)
        cache.ensure(slot, seq_len)
        for layer in used(cache):
            for rows in cache.rows(slot, layer):
                rows.normal_()
        if backend.masks_over_read:
            poison_past(cache, slot, seq_len)


def compare(
    backend: AttentionBackend,
    cache: KVCache,
    slots: Sequence[int],
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    layers: Sequence[int],
) -> None:
    """Against the reference, in float32 on copies of the same rows."""
    (group,) = cache.layout.groups
    batch = AttentionBatch.build(slots, query_lens, seq_lens, cache.device)
    dense = AttentionBatch.build(range(len(slots)), query_lens, seq_lens, cache.device)
    scale = group.head_dim**-0.5
    num_heads = group.num_kv_heads * (4 if group.num_kv_heads < 64 else 2)
    q = torch.randn(batch.num_tokens, num_heads, group.head_dim, device=cache.device).to(cache.layout.dtype)
    for layer in layers:
        longest = max(seq_lens)
        rows = [[x[:n] for x in cache.rows(slot, layer)] for slot, n in zip(slots, seq_lens, strict=True)]
        k, v = (
            torch.stack([F.pad(pair[i].float(), (0, 0, 0, 0, 0, longest - len(pair[i]))) for pair in rows])
            for i in range(2)
        )
        for window in (None, WINDOW):
            with cache.step(slots):
                out = backend(q, cache.k(layer), cache.v(layer), batch, scale=scale, window=window)
            expected = get("reference")(q.float(), k, v, dense, scale=scale, window=window)
            what = f"{backend.name}, queries {query_lens}, lengths {seq_lens}, layer {layer}, window {window}"
            assert out.dtype == cache.layout.dtype
            assert not out.isnan().any(), f"NaN: {what}"
            tolerance = TOLERANCE[cache.layout.dtype]
            torch.testing.assert_close(
                out.float(), expected, rtol=tolerance, atol=tolerance, msg=lambda text, what=what: f"{what}\n{text}"
            )


def test_every_length_alone(backend: AttentionBackend, cache: KVCache) -> None:
    """Decode, a chunk and a whole prefill of one sequence; in the next slot another's NaNs."""
    torch.manual_seed(0)
    last = cache.layout.num_layers - 1
    neighbour = cache.acquire(4)
    cache.ensure(neighbour, 64)
    poison(cache, neighbour)
    for seq_len in LENGTHS:
        slot = cache.acquire(3)
        fill(cache, [slot], [seq_len], backend)
        for query_len, layers in ((1, (0, last)), (min(37, seq_len), (last,)), (seq_len, (last,))):
            if query_len > 256 and cache.device.type == "cpu":
                continue  # the reference takes too long
            compare(backend, cache, [slot], [query_len], [seq_len], layers)
        cache.release(slot)


def test_batches_of_mixed_lengths(backend: AttentionBackend, cache: KVCache) -> None:
    """Eight sequences in slots of any order: a decode step, and decode, chunks and prefill in one pass."""
    torch.manual_seed(1)
    rng = random.Random(1)
    for first in range(0, len(LENGTHS), 8):
        lengths = LENGTHS[first : first + 8]
        rng.shuffle(lengths)
        slots = rng.sample(range(10), len(lengths))
        for slot in slots:
            cache.acquire(slot)
        fill(cache, slots, lengths, backend)
        longest = 64 if cache.device.type == "cpu" else MAX_SEQ_LEN
        mixed = [min(longest, rng.choice((1, min(5, n), rng.randint(1, n), n))) for n in lengths]
        for query_lens in ([1] * len(lengths), mixed):
            compare(backend, cache, slots, query_lens, lengths, (cache.layout.num_layers - 1,))
        for slot in slots:
            cache.release(slot)


def test_decode_steps_of_equal_lengths(backend: AttentionBackend, cache: KVCache) -> None:
    """Of neighbouring slots in order, whose rows are a rectangle, and of others; another's NaNs on both sides."""
    torch.manual_seed(3)
    for slots, lengths in (((3, 4, 5), LENGTHS[::3]), ((5, 3, 4), LENGTHS[1::9]), ((3, 5, 8), LENGTHS[2::9])):
        neighbours = [slot for slot in (2, 4, 6) if slot not in slots]
        for slot in (*slots, *neighbours):
            cache.acquire(slot)
        for seq_len in lengths:
            cache.ensure_batch(neighbours, [min(seq_len + 64, MAX_SEQ_LEN)] * len(neighbours))
            for slot in neighbours:
                poison(cache, slot)
            fill(cache, slots, [seq_len] * 3, backend)
            compare(backend, cache, slots, [1] * 3, [seq_len] * 3, (0, cache.layout.num_layers - 1))
        for slot in (*slots, *neighbours):
            cache.release(slot)


def test_decoding_over_page_boundaries(backend: AttentionBackend, cache: KVCache) -> None:
    """Row by row, as in use: what a page brought with it is never seen."""
    torch.manual_seed(2)
    slots = [cache.acquire(slot) for slot in (7, 2)]
    fill(cache, slots, [3, 120], backend)
    for step in range(1, 41):
        lengths = [3 + step, 120 + step]
        cache.ensure_batch(slots, lengths)
        for slot in slots:
            for layer in used(cache):
                for rows in cache.rows(slot, layer):
                    rows[-1].normal_()
        compare(backend, cache, slots, [1, 1], lengths, (0,))


@pytest.mark.parametrize("told_masked", [False, True])
def test_nothing_is_clean_by_chance(make_cache: Callable[..., KVCache], told_masked: bool) -> None:
    """The same with a cache that was told not to care: then the NaNs do show."""
    backend = WholeTiles()
    cache = make_cache(
        HOST.layout("token", 64), 4, page_bytes=HOST.page_bytes, over_read_tokens=127, over_read_masked=told_masked
    )
    slot = cache.acquire()
    fill(cache, [slot], [100], backend)
    batch = AttentionBatch.build([slot], [1], [100], "cpu")
    out = backend(torch.randn(1, 2, 64), cache.k(0), cache.v(0), batch, scale=0.125)
    assert out.isnan().any() == told_masked
