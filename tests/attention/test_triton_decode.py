"""The split-KV decode kernel: against the reference, over NaNs and unmapped pages, with lengths on the device only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vattn import KVCache, KVLayout
from vattn.attention import AttentionBatch, DecodeWorkspace, TritonDecodeAttention, get
from vattn.attention.triton_decode import MAX_SPLITS, choose_splits
from vattn.errors import ConfigError

NAN = float("nan")
EDGES = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SPLITS = [1, 2, 5, 16]


@dataclass
class Case:
    """Inputs of one call, with NaN in every row that the query must not see."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    batch: AttentionBatch
    options: dict[str, Any]

    def expected(self) -> torch.Tensor:
        """In float64 on the host, of what the kernel was given."""
        batch = AttentionBatch(
            self.batch.slots, self.batch.query_lens, self.batch.seq_lens, torch.device("cpu"), self.batch.starts
        )
        options = {name: x.cpu().double() if name == "sinks" else x for name, x in self.options.items()}
        # The reference reads rows outside the window, and gives them no weight; a NaN has some.
        q, k, v = (x.cpu().double() for x in (self.q, self.k.nan_to_num(0.0), self.v.nan_to_num(0.0)))
        return get("reference")(q, k, v, batch, **options)

    def check(self, out: torch.Tensor, tolerance: float | None = None) -> None:
        assert out.dtype == self.q.dtype
        tolerance = tolerance or TOLERANCE[out.dtype]
        torch.testing.assert_close(out.cpu().double(), self.expected(), rtol=tolerance, atol=tolerance)


def make_case(
    seq_lens: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    starts: Sequence[int] | None = None,
    sinks: bool = False,
    **options: Any,
) -> Case:
    """K and V interleaved in token-major memory, slots in any order."""
    num_heads, num_kv_heads = heads
    head_dim, v_head_dim = head_dims
    draw = torch.Generator().manual_seed(sum(seq_lens) + 10 * num_heads + head_dim)
    first_rows = [0] * len(seq_lens) if starts is None else list(starts)
    num_slots = len(seq_lens) + 1
    num_rows = max(start + n for start, n in zip(first_rows, seq_lens, strict=True)) + 3
    slots = torch.randperm(num_slots, generator=draw)[: len(seq_lens)].tolist()
    row = num_kv_heads * (head_dim + v_head_dim)
    memory = torch.randn(num_slots, num_rows, row, generator=draw) * 1.5
    seen = torch.zeros(num_slots, num_rows, dtype=torch.bool)
    for slot, start, n in zip(slots, first_rows, seq_lens, strict=True):
        seen[slot, start + max(0, n - (options.get("window") or n)) : start + n] = True
    memory[~seen] = NAN
    memory = memory.to(device, dtype)
    if sinks:
        options["sinks"] = (torch.randn(num_heads, generator=draw) * 2).to(device)
    return Case(
        torch.randn(len(seq_lens), num_heads, head_dim, generator=draw).to(device, dtype),
        memory[..., : num_kv_heads * head_dim].unflatten(-1, (num_kv_heads, head_dim)),
        memory[..., num_kv_heads * head_dim :].unflatten(-1, (num_kv_heads, v_head_dim)),
        AttentionBatch(
            tuple(slots),
            (1,) * len(seq_lens),
            tuple(seq_lens),
            torch.device(device),
            None if starts is None else tuple(starts),
        ),
        {"scale": head_dim**-0.5, **options},
    )


def run(attention: TritonDecodeAttention, case: Case, **more: Any) -> torch.Tensor:
    return attention(case.q, case.k, case.v, case.batch, **case.options, **more)


@pytest.fixture(params=[True, False], ids=["fused", "two kernels"])
def fused(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("seq_len", EDGES)
def test_one_sequence(seq_len: int, splits: int, fused: bool, device: str) -> None:
    case = make_case([seq_len], device=device)
    case.check(run(TritonDecodeAttention(splits=splits, fused_combine=fused), case))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (7, 1)], ids=["1", "4", "7"])
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (128, 128), (128, 64), (72, 104), (12, 8)], ids=str)
def test_shapes(head_dims: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Mixed lengths, with fewer blocks of rows than splits and with more."""
    case = make_case([1, 65, 200], heads, head_dims, dtype, device)
    case.check(TritonDecodeAttention(splits=3)(case.q, case.k, case.v, case.batch, **case.options))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 64},
        {"window": 100},
        {"window": 1000},
        {"starts": [5, 0, 31, 64]},
        {"softcap": 2.0},
        {"sinks": True},
        {"window": 70, "starts": [5, 0, 31, 64], "softcap": 2.0, "sinks": True},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("splits", SPLITS)
def test_options(options: dict[str, Any], splits: int, fused: bool, device: str) -> None:
    case = make_case([200, 1, 66, 129], (6, 2), device=device, **options)
    case.check(run(TritonDecodeAttention(splits=splits, fused_combine=fused), case))


def test_scores_of_any_size(device: str) -> None:
    """Splits whose maxima lie far apart; scores beyond what a softcap's exponential holds."""
    for softcap in (None, 30.0):
        case = make_case([200], device=device, softcap=softcap)
        case.k[:, 128:] *= 200  # scores of 1,000, to which float32 gives four decimals
        case.check(run(TritonDecodeAttention(splits=4), case), 1e-3)
    case = make_case([200], device=device, sinks=True)
    case.options["sinks"] = torch.tensor([-torch.inf, 300.0, -300.0, 0.0], device=device)
    case.check(run(TritonDecodeAttention(splits=4), case))


def test_other_blocks(device: str) -> None:
    case = make_case([1, 40, 200], (6, 2), dtype=torch.float16, device=device)
    for block_n, num_warps, num_stages in ((16, 4, 2), (32, 2, 4), (128, 8, 1)):
        case.check(run(TritonDecodeAttention(block_n, num_warps, num_stages, splits=3), case))


def test_more_splits_than_are_combined_at_once(fused: bool, device: str) -> None:
    attention = TritonDecodeAttention(16, num_stages=2, splits=44, fused_combine=fused)
    case = make_case([700, 40], (8, 1), (16, 256), sinks=True, device=device)
    case.k[:, ::100] *= 4
    case.check(run(attention, case))


def test_one_workspace_for_many_launches(device: str) -> None:
    """Counters return to zero, and what a longer launch left among the partial sums does not matter."""
    attention = TritonDecodeAttention(splits=5)
    workspace = attention.workspace(4, 8, 2, 80, 400, device)
    workspace.partials.fill_(NAN)
    for seq_lens in ([300, 17, 64, 129], [65, 200], [1, 1, 1], [200, 1], [300, 17, 64, 129]):
        case = make_case(seq_lens, (8, 2), (64, 80), device=device)
        case.check(run(attention, case, workspace=workspace))
        assert not workspace.counters.any()


def test_output_into_a_given_tensor(device: str) -> None:
    case = make_case([100, 30], (8, 2), device=device)
    wide = torch.full((2, 10, 3 * 64), NAN, device=device)
    out = wide[:, 1:9, 64:128]
    assert run(TritonDecodeAttention(splits=2), case, out=out) is out
    case.check(out)
    assert wide.isnan().sum() == wide.numel() - out.numel()


def test_strided_queries(device: str) -> None:
    """As a slice of a fused projection."""
    case = make_case([100, 30], (8, 2), device=device)
    wide = torch.randn(2, 13, 64, device=device)
    wide[:, 3:11] = case.q
    case.q = wide[:, 3:11]
    case.check(run(TritonDecodeAttention(splits=2), case))


def test_lengths_on_the_device_only(fused: bool, device: str) -> None:
    """As in a CUDA graph: captured for more rows than there are, with a slot listed twice."""
    attention = TritonDecodeAttention(splits=None, fused_combine=fused)
    case = make_case([200, 70, 1], (8, 2), sinks=True, starts=[3, 0, 9], device=device)
    order = [0, 2, 1, 0, 2]
    batch = SimpleNamespace(
        batch_size=len(order),
        max_query_len=1,
        max_end=4096,
        slots_int32=case.batch.slots_int32[order],
        ends_int32=case.batch.ends_int32[order],
        starts_int32=case.batch.starts_int32[order],
    )
    workspace = attention.workspace(8, 8, 2, 64, 4096, device)
    for _ in range(2):
        out = attention(case.q[order], case.k, case.v, batch, **case.options, workspace=workspace)
        torch.testing.assert_close(out.cpu().double(), case.expected()[order], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_in_a_graph(fused: bool) -> None:
    """Captured once, replayed for lengths that are only on the device."""
    attention = TritonDecodeAttention(fused_combine=fused)
    case = make_case([3000, 700, 64], (8, 2), (128, 128), torch.bfloat16, "cuda")
    ends = torch.ones(3, dtype=torch.int32, device="cuda")
    batch = SimpleNamespace(
        batch_size=3,
        max_query_len=1,
        max_end=4096,
        slots_int32=case.batch.slots_int32,
        ends_int32=ends,
        starts_int32=None,
    )
    workspace = attention.workspace(3, 8, 2, 128, 4096, "cuda")

    def step() -> torch.Tensor:
        return attention(case.q, case.k, case.v, batch, **case.options, workspace=workspace)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seq_lens in ([3000, 700, 64], [1, 65, 2], [2049, 3, 63]):
        ends.copy_(torch.tensor(seq_lens))
        case.batch = AttentionBatch.build(case.batch.slots, [1, 1, 1], seq_lens, "cuda")
        for _ in range(20):
            graph.replay()
        case.check(out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_long_contexts_time_and_again(batch_size: int, pdl: bool, fused: bool) -> None:
    """All launches give the same bits, however their programs were scheduled."""
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs Hopper")
    seq_lens = [6000 - 211 * i for i in range(batch_size)]
    case = make_case(seq_lens, (8, 2), (128, 128), torch.bfloat16, "cuda")
    attention = TritonDecodeAttention(fused_combine=fused, pdl=pdl)
    workspace = attention.workspace(batch_size, 8, 2, 128, 6000, "cuda")
    first = run(attention, case, workspace=workspace)
    case.check(first)
    outs = [run(attention, case, workspace=workspace) for _ in range(200)]
    assert all(torch.equal(out, first) for out in outs)
    assert not workspace.counters.any()


def test_empty_rows_of_a_padded_batch(fused: bool, device: str) -> None:
    """A graph may carry sequences without rows; they come out as zeros and disturb nobody."""
    for sinks in (False, True):
        case = make_case([200, 70], sinks=sinks, device=device)
        expected = case.expected()
        batch = SimpleNamespace(
            batch_size=2,
            max_query_len=1,
            max_end=200,
            slots_int32=case.batch.slots_int32,
            ends_int32=torch.tensor([200, 0], dtype=torch.int32, device=device),
            starts_int32=None,
        )
        attention = TritonDecodeAttention(splits=3, fused_combine=fused)
        out = attention(case.q, case.k, case.v, batch, **case.options)
        torch.testing.assert_close(out[0].cpu().double(), expected[0], rtol=1e-5, atol=1e-5)
        assert not out[1].any()


@pytest.mark.parametrize(("order", "head_dim"), [("token", 64), ("layer", 64), ("layer", 80)])
def test_over_unmapped_pages(
    order: str, head_dim: int, fused: bool, device: str, make_cache: Callable[..., KVCache]
) -> None:
    """Every byte mapped behind a sequence is NaN, and what lies beyond has no memory.

    On the host 128 rows of two heads of 80 end where a page does, and those that the kernel pads to 128 would not.
    """
    on_host = device == "cpu"
    # So many heads that a slot is of several of a GPU's pages of 2 MiB.
    layers, heads = (2, 2) if on_host else {"token": (32, 8), "layer": (2, 32)}[order]
    dtype = torch.float32 if on_host else torch.bfloat16
    layout = KVLayout(layers, heads, head_dim, 1088, dtype, order)
    options = {"page_bytes": 16384} if on_host else {}
    cache = make_cache(layout, 4, device, 2**28 if on_host else 2**33, **options)
    (group,) = layout.groups
    lanes = layout.plan(group, cache.max_slots, cache.page_bytes, 0).lanes
    view, size = cache.k(0), dtype.itemsize
    base = view.untyped_storage().data_ptr()
    attention = TritonDecodeAttention(splits=3, fused_combine=fused)
    draw = torch.Generator().manual_seed(0)
    for lengths in ([1, 16, 63, 128], [17, 64, 129, 200]):
        slots = [cache.acquire() for _ in lengths]
        for slot, seq_len in zip(slots, lengths, strict=True):
            cache.ensure(slot, seq_len)
            for layer in layout.layers:
                for rows in cache.rows(slot, layer):
                    rows.copy_(torch.randn(rows.shape, generator=draw))
            for lane in lanes:
                first = lane.slot_offset(slot)
                pages = -(-seq_len * lane.row_bytes // cache.page_bytes)
                beyond = base + first + pages * cache.page_bytes
                assert beyond - cache.page_bytes in cache.driver.book.mappings
                assert beyond not in cache.driver.book.mappings
                start, end = seq_len * lane.row_bytes // size, pages * cache.page_bytes // size
                view.as_strided((end - start,), (1,), first // size + start).fill_(NAN)
        batch = AttentionBatch.build(slots, [1] * len(lengths), lengths, device)
        q = torch.randn(len(lengths), 4 * heads, head_dim, generator=draw).to(device, dtype)
        for layer in (0, layout.num_layers - 1):
            for window in (None, 20):
                with cache.step(slots):
                    out = attention(q, cache.k(layer), cache.v(layer), batch, scale=0.125, window=window)
                expected = get("reference")(q, cache.k(layer), cache.v(layer), batch, scale=0.125, window=window)
                torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        for slot in slots:
            cache.release(slot)
        cache.trim()  # or its pages would stay where they are


def test_refusals() -> None:
    attention = TritonDecodeAttention(splits=4)
    case = make_case([100, 30])
    with pytest.raises(ConfigError, match="one new token of each sequence, got up to 2"):
        attention(case.q, case.k, case.v, AttentionBatch.build([0, 1], [1, 2], [5, 5], "cpu"), scale=1.0)
    small = attention.workspace(1, 4, 2, 64, 1000, "cpu")
    with pytest.raises(ConfigError, match="needs a workspace of 2112 partial sums and 4 counters"):
        run(attention, case, workspace=small)
    with pytest.raises(ConfigError, match="needs a workspace"):
        run(attention, case, workspace=DecodeWorkspace(torch.empty(9999), small.counters))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "needs an NVIDIA GPU, got device cpu"),
        ("cuda", torch.float64, 64, "expected float16, bfloat16 or float32"),
        ("cuda", torch.bfloat16, 264, "at most 256"),
    ],
)
def test_reasons(device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in str(get("triton-decode").supports(torch.device(device), dtype, head_dim))


def test_choice_of_splits() -> None:
    assert choose_splits(1, 8, 65536, 132) == 33
    assert choose_splits(1, 1, 65536, 132) == MAX_SPLITS
    assert choose_splits(1, 8, 100, 132) == 2  # no more than there are blocks
    assert choose_splits(8, 8, 65536, 132) == 4
    assert choose_splits(64, 8, 65536, 132) == 1
    attention = TritonDecodeAttention()
    workspace = attention.workspace(64, 32, 8, 128, 65536, "cpu")
    for batch_size in range(1, 65):  # it holds every smaller launch too
        splits = choose_splits(batch_size, 8, 65536)
        assert splits == 1 or batch_size * splits * 32 * 130 <= workspace.partials.numel()
    assert workspace.partials.numel() * 4 < 2**20
