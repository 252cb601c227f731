"""Attention backends: the reference against plain float64 arithmetic, the others against the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from vattn import KVCache
from vattn.attention import (
    AttentionBackend,
    AttentionBatch,
    PhasedAttention,
    backends,
    choice,
    choose,
    decode_backends,
    flash_attn2,
    flash_attn3,
    get,
    require_fit,
)
from vattn.attention.torch_varlen import flatten
from vattn.errors import ConfigError

CPU = torch.device("cpu")
ON_CPU = [backend for backend in backends() if backend.supports(CPU, torch.float32, 64) is None]

# (query_lens, seq_lens): decode, whole prefill, chunked prefill, all mixed, more queries than one masked block holds
LENGTHS = {
    "decode": ([1, 1, 1], [1, 17, 64]),
    "prefill": ([5, 1, 33], [5, 1, 33]),
    "chunk": ([4, 16], [9, 47]),
    "mixed": ([1, 7, 12, 3], [40, 7, 29, 64]),
    "long chunk": ([1100], [1300]),
}


def make_case(
    query_lens: list[int],
    seq_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]:
    """Random q, and k and v laid out token-major (K and V interleaved) with NaN in every row past a sequence's end."""
    generator = torch.Generator().manual_seed(sum(seq_lens) + num_heads)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    max_slots, max_seq_len = len(seq_lens) + 2, max(seq_lens) + 5
    row = num_kv_heads * (head_dim + v_head_dim)
    memory = torch.randn(max_slots, max_seq_len, row, generator=generator).to(device, dtype)
    k = memory[..., : num_kv_heads * head_dim].unflatten(-1, (num_kv_heads, head_dim))
    v = memory[..., num_kv_heads * head_dim :].unflatten(-1, (num_kv_heads, v_head_dim))
    slots = torch.randperm(max_slots, generator=generator)[: len(seq_lens)].tolist()
    for slot in range(max_slots):
        memory[slot, seq_lens[slots.index(slot)] if slot in slots else 0 :] = float("nan")
    q = torch.randn(sum(query_lens), num_heads, head_dim, generator=generator).to(device, dtype)
    return q, k, v, AttentionBatch.build(slots, query_lens, seq_lens, device)


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, scale: float, window: int | None
) -> torch.Tensor:
    """One query and one head at a time, in float64."""
    out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=torch.float64)
    for i, (slot, query_len, seq_len) in enumerate(zip(batch.slots, batch.query_lens, batch.seq_lens, strict=True)):
        for j in range(query_len):
            token, row = batch.query_starts[i] + j, seq_len - query_len + j
            rows = slice(0 if window is None else max(0, row - window + 1), row + 1)
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // k.shape[2])
                scores = (k[slot, rows, kv_head].double() @ q[token, head].double()) * scale
                weights = (scores - scores.max()).exp()
                out[token, head] = weights @ v[slot, rows, kv_head].double() / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("lengths", ["decode", "prefill", "chunk", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_the_formula(dtype: torch.dtype, lengths: str, window: int | None) -> None:
    q, k, v, batch = make_case(*LENGTHS[lengths], num_heads=6, num_kv_heads=2, head_dim=10, v_head_dim=7, dtype=dtype)
    out = get("reference")(q, k, v, batch, scale=0.3, window=window)
    assert out.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(out.double(), by_hand(q, k, v, batch, 0.3, window), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 6, 2000])
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "v_head_dim"),
    [(4, 4, 16, 16), (9, 3, 64, 64), (6, 1, 80, 80), (2, 2, 5, 5), (8, 2, 33, 17)],
)
@pytest.mark.parametrize("backend", [b for b in ON_CPU if b.name != "reference"], ids=lambda b: b.name)
def test_backend_equals_reference(
    backend: AttentionBackend,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    lengths: str,
    window: int | None,
) -> None:
    q, k, v, batch = make_case(*LENGTHS[lengths], num_heads, num_kv_heads, head_dim, v_head_dim)
    scale = head_dim**-0.5
    expected = get("reference")(q, k, v, batch, scale=scale, window=window)
    torch.testing.assert_close(backend(q, k, v, batch, scale=scale, window=window), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("backend", backends(), ids=lambda b: b.name)
def test_backend_on_the_gpu(backend: AttentionBackend, lengths: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    if reason := backend.supports(device, dtype, 64):
        pytest.skip(reason)
    for window in (None, 6):
        q, k, v, batch = make_case(*LENGTHS[lengths], 9, 3, 64, dtype=dtype, device=device)
        if not backend.masks_over_read:  # then a cache would not leave NaNs there
            k.nan_to_num_()
            v.nan_to_num_()
        out = backend(q, k, v, batch, scale=0.125, window=window)
        on_host = AttentionBatch.build(batch.slots, batch.query_lens, batch.seq_lens, "cpu")
        expected = get("reference")(*(x.cpu().float() for x in (q, k, v)), on_host, scale=0.125, window=window)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def test_last_query_sees_every_row() -> None:
    """Right-aligned: a chunk at the end of a sequence attends to all of its past, which a top-left mask would hide."""
    k = torch.zeros(1, 8, 1, 4)
    v = torch.arange(8.0)[None, :, None, None].expand(1, 8, 1, 4)
    batch = AttentionBatch.build([0], [3], [8], "cpu")
    expected = torch.tensor([sum(range(n)) / n for n in (6, 7, 8)])
    for backend in ON_CPU:
        out = backend(torch.zeros(3, 1, 4), k, v, batch, scale=1.0)
        torch.testing.assert_close(out[:, 0, 0], expected, msg=backend.name)


def test_batch_index_tensors() -> None:
    batch = AttentionBatch.build([7, 2, 5], [1, 3, 2], [4, 3, 9], "cpu")
    assert (batch.batch_size, batch.num_tokens, batch.max_query_len, batch.max_seq_len) == (3, 6, 3, 9)
    assert batch.query_starts == (0, 1, 4, 6)
    assert batch.slots_int32.tolist() == [7, 2, 5]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4, 6]
    assert batch.seq_lens_int32.tolist() == [4, 3, 9]
    assert batch.token_slots.tolist() == [7, 2, 2, 2, 5, 5]
    assert batch.token_positions.tolist() == [3, 0, 1, 2, 7, 8]
    assert batch.last_tokens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens_q.dtype == batch.seq_lens_int32.dtype == torch.int32
    assert batch.token_slots.dtype == torch.int64
    assert batch.token_slots is batch.token_slots  # one upload for all layers


def test_batch_by_query_len() -> None:
    batch = AttentionBatch.build([7, 2, 5, 4], [2, 1, 2, 3], [4, 3, 9, 3], "cpu")
    groups = [(g.query_len, g.tokens.tolist(), g.slots.tolist(), g.ends.tolist()) for g in batch.groups_by_query_len]
    assert groups == [(1, [2], [2], [3]), (2, [0, 1, 3, 4], [7, 5], [4, 9]), (3, [5, 6, 7], [4], [3])]


def test_batch_row_starts() -> None:
    batch = AttentionBatch.build([7, 2], [1, 1], [4, 9], "cpu")
    assert batch.row_starts(100).tolist() == [700, 200, 209]
    assert batch.row_starts(100) is batch.row_starts(100)
    assert batch.row_starts(10).tolist() == [70, 20, 29]
    assert AttentionBatch.build([1], [1], [2**30 - 1], "cpu").row_starts(2**30).tolist() == [2**30, 2**31 - 1]
    with pytest.raises(ConfigError, match="32 bits"):
        AttentionBatch.build([1], [1], [2**30], "cpu").row_starts(2**30)


@pytest.mark.parametrize(
    ("slots", "query_lens", "seq_lens"),
    [([], [], []), ([0], [1, 1], [1]), ([0, 0], [1, 1], [1, 1]), ([0], [0], [1]), ([0], [2], [1]), ([0], [1], [])],
)
def test_batch_refuses_what_disagrees(slots: list[int], query_lens: list[int], seq_lens: list[int]) -> None:
    with pytest.raises(ConfigError):
        AttentionBatch.build(slots, query_lens, seq_lens, "cpu")


def test_flattening_slots_to_one_token_axis() -> None:
    memory = torch.arange(3 * 7 * 5).view(3, 7, 5)  # 7 rows to a slot, 5 in use; rows of 5 elements
    tokens, rows_per_slot = flatten(memory[:, :5, 1:5].unflatten(-1, (2, 2)))
    assert (rows_per_slot, tokens.shape) == (7, (19, 2, 2))
    assert torch.equal(tokens[7 * 2 + 4], memory[2, 4, 1:5].view(2, 2))
    with pytest.raises(ConfigError, match="multiple of the row stride"):
        flatten(memory.as_strided((2, 3, 1, 2), (11, 5, 2, 1)))
    with pytest.raises(ConfigError, match="32 bits"):
        flatten(torch.empty(3, 2**30, 1, 8, device="meta"))


# The registry -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stub:
    """A backend that only says which one it is."""

    name: str
    over_read_tokens: int = 0
    masks_over_read: bool = True
    reason: str | None = None
    features: frozenset[str] = frozenset()

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return self.reason

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.name  # type: ignore[return-value]


def test_registry() -> None:
    names = [backend.name for backend in backends()]
    assert names == ["flash-attn-3", "flash-attn-2", "torch-varlen", "sdpa", "reference"]
    assert [backend.name for backend in decode_backends()] == [*names, "triton-decode"]
    for backend in decode_backends():
        assert isinstance(backend, AttentionBackend)
        assert get(backend.name) is backend
        assert backend.over_read_tokens >= 0
    assert isinstance(PhasedAttention(get("sdpa"), get("reference")), AttentionBackend)
    assert choose("cpu", torch.float32, 64) is get("sdpa")
    with pytest.raises(ConfigError, match="sdpa"):
        get("nonesuch")
    with pytest.raises(ConfigError, match=r"int8.*flash-attn-3: needs an NVIDIA GPU"):
        choose("cpu", torch.int8, 64)


@pytest.mark.parametrize("backend", ["flash-attn-3", "flash-attn-2", "torch-varlen"])
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "needs an NVIDIA GPU, got device cpu"),
        ("cuda", torch.float32, 64, "expected float16 or bfloat16"),
    ],
)
def test_reasons(backend: str, device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in str(get(backend).supports(torch.device(device), dtype, head_dim))


def test_absent_packages_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for backend, module, words in (
        ("flash-attn-2", flash_attn2, "pip install flash-attn"),
        ("flash-attn-3", flash_attn3, "not installed: build it"),
    ):
        module._unavailable.cache_clear()
        assert words in str(get(backend).supports(torch.device("cuda"), torch.bfloat16, 64))
        module._unavailable.cache_clear()


def test_builds_that_leave_things_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(dtype: torch.dtype, head_dim: int, *disabled: str) -> str | None:
        flags = {f"FLASHATTENTION_DISABLE_{feature}": True for feature in disabled}
        monkeypatch.setattr(flash_attn3, "_build_flags", lambda: flags)
        return flash_attn3._unsupported_by_build(dtype, head_dim)

    assert reason(torch.bfloat16, 80, "HDIM96", "SOFTCAP") is None  # runs on the kernel for 128
    assert "at most 128" in str(reason(torch.bfloat16, 192, "HDIM192", "HDIM256"))
    assert reason(torch.bfloat16, 192, "HDIM192") is None
    assert "multiple of 8" in str(reason(torch.bfloat16, 60))
    assert "without FP16" in str(reason(torch.float16, 64, "FP16"))
    assert "without VARLEN, LOCAL" in str(reason(torch.bfloat16, 64, "VARLEN", "LOCAL"))


@pytest.mark.parametrize(
    ("absent", "max_over_read", "expected"),
    [
        ((), None, "flash-attn-3+flash-attn-2"),
        ((), 191, "flash-attn-3+flash-attn-2"),
        ((), 190, "flash-attn-2"),
        (("flash-attn-2",), None, "flash-attn-3"),
        (("flash-attn-2",), 0, "torch-varlen+triton-decode"),
        (("flash-attn-2", "triton-decode"), 0, "torch-varlen"),
        (("flash-attn-3",), None, "flash-attn-2"),
        (("flash-attn-3", "flash-attn-2"), None, "torch-varlen+triton-decode"),
        (("flash-attn-3", "flash-attn-2", "torch-varlen"), None, "sdpa+triton-decode"),
        (("flash-attn-3", "flash-attn-2", "torch-varlen", "triton-decode"), None, "sdpa"),
    ],
)
def test_choice_by_phase(
    monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...], max_over_read: int | None, expected: str
) -> None:
    stubs = tuple(
        Stub(b.name, b.over_read_tokens, b.masks_over_read, "not here" if b.name in absent else None)
        for b in decode_backends()
    )
    monkeypatch.setattr(choice, "_ALL", stubs)
    assert choose("cuda", torch.bfloat16, 128, max_over_read=max_over_read).name == expected
    in_float32 = choose("cuda", torch.float32, 128, max_over_read=max_over_read).name
    assert in_float32 == {"torch-varlen+triton-decode": "torch-varlen", "sdpa+triton-decode": "sdpa"}.get(
        expected, expected
    )


def test_prefill_needs_a_backend_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = [Stub(b.name, reason=None if b.decode_only else "not here") for b in decode_backends()]
    monkeypatch.setattr(choice, "_ALL", stubs)
    with pytest.raises(ConfigError, match="sdpa: not here"):
        choose("cuda", torch.bfloat16, 128)


def test_phases() -> None:
    phased = PhasedAttention(Stub("wide", 100, False), Stub("narrow", 20, True))
    assert (phased.name, phased.over_read_tokens, phased.masks_over_read) == ("wide+narrow", 100, False)
    x = torch.zeros(1)
    for query_lens, expected in (((1, 1), "narrow"), ((1, 2), "wide")):
        batch = AttentionBatch.build([0, 1], query_lens, [2, 2], "cpu")
        assert phased(x, x, x, batch, scale=1.0) == expected
    broken = PhasedAttention(Stub("wide"), Stub("narrow", reason="no such thing"))
    assert broken.supports(CPU, torch.float32, 64) == "narrow: no such thing"


def test_a_backend_must_fit_the_cache(make_cache: Callable[..., KVCache]) -> None:
    bare = make_cache()
    require_fit(Stub("tidy"), bare)
    with pytest.raises(ConfigError, match=r"'wide' reads up to 100 rows.*keeps 0 mapped.*over_read_tokens=100"):
        require_fit(Stub("wide", 100), bare)
    granted = make_cache(over_read_tokens=100)
    require_fit(Stub("wide", 100, False), granted)
    with pytest.raises(ConfigError, match="keeps 100 mapped"):
        require_fit(Stub("wider", 101), granted)
    unclean = make_cache(over_read_tokens=100, over_read_masked=True)
    require_fit(Stub("wide", 100, True), unclean)
    with pytest.raises(ConfigError, match="over_read_masked=False"):
        require_fit(Stub("wide", 100, False), unclean)
