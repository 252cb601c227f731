"""A decode step as one persistent kernel: its sizes on the CPU, its results on a GPU against the references."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vattn
from vattn.attention import DecodeBatch, bind, get
from vattn.decode import DecodeLoop
from vattn.errors import ConfigError
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.models.ways import persistent_step as persistent_step_of
from vattn.models.ways import step_shape
from vattn.ops import compiled as compiling
from vattn.ops import persistent_step
from vattn.ops.ops_table import reference_ops
from vattn.ops.persistent_step import PersistentStep, StepShape, persistent_unavailable, shared_memory

NATIVE = Path(__file__).parents[2] / "native"
LLAMA_8B = StepShape(4096, 32, 8, 128, 14336, 128256, 32)
LLAMA_1B = StepShape(2048, 32, 8, 64, 8192, 128256, 16)
HOPPER_BYTES = 227 * 1024  # of shared memory, at most, to a block

SMALL = LlamaConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
)
CONFIGS = {
    "small": SMALL,
    "biases in Q, K and V": replace(SMALL, attention_bias=True, attention_output_bias=False),
    "biases everywhere": replace(SMALL, attention_bias=True, mlp_bias=True),
    "normed heads of 128": replace(SMALL, qk_norm=True, head_dim=128),
    "windows": replace(SMALL, windows=(100, None, 37)),
    "one KV head": replace(SMALL, num_kv_heads=1),
    "as many KV heads": replace(SMALL, num_kv_heads=8, tie_word_embeddings=True),
    "more chunks than stages": replace(SMALL, hidden_size=1024, num_heads=16, num_kv_heads=4, intermediate_size=8192),
    "several pieces of the stream a thread": replace(SMALL, hidden_size=4096, num_layers=2),
    "SmolLM2's sizes, odd vocabulary": replace(
        SMALL, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, vocab_size=1003
    ),
}


# -- sizes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [(LLAMA_8B, 1), (LLAMA_8B, 2), (LLAMA_1B, 4), (StepShape(576, 9, 3, 64, 1536, 49152, 30), 8)],
)
def test_shared_memory_holds_activations_and_a_ring(shape, tokens):
    stages, x, total = shared_memory(shape, tokens, HOPPER_BYTES)
    assert stages >= persistent_step._CONSUMERS, "each warp has a stage of its own"
    assert x >= tokens * 2 * max(shape.hidden, shape.intermediate)
    assert total <= HOPPER_BYTES
    assert total + 16 * (2 * 512 + 64) > HOPPER_BYTES - 128, "one more stage would fit"


@pytest.mark.parametrize(("shape", "tokens"), [(LLAMA_8B, 4), (LLAMA_8B, 8), (LLAMA_1B, 8)])
def test_activations_that_leave_no_room(shape, tokens):
    with pytest.raises(ConfigError, match=f"activations of {tokens} tokens"):
        shared_memory(shape, tokens, HOPPER_BYTES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 80}, "heads of 80"),
        ({"kv_heads": 5}, "over 5 KV heads"),
        ({"heads": 72}, "up to 8 heads"),
        ({"intermediate": 8200}, "multiples of 32"),
        ({"hidden": 2056}, "multiples of 32"),
        ({"layers": 129}, "up to 128"),
    ],
    ids=str,
)
def test_shapes_that_have_no_kernel(change, reason):
    assert LLAMA_1B.unsupported() is None
    assert reason in replace(LLAMA_1B, **change).unsupported()


def test_without_a_gpu():
    reason = persistent_unavailable(torch.device("cpu"), torch.bfloat16, LLAMA_1B, 1)
    assert "GPU" in reason
    weight = torch.zeros(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        PersistentStep(LLAMA_1B, [], weight, weight, weight, 1e-5)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_missing", lambda: "no NVRTC here")
    with pytest.raises(ConfigError, match="no NVRTC here"):
        compiling.compiled("decode_step.cu", (), {}, "sm_90a")


def test_kept_code_is_whole(tmp_path):
    path = tmp_path / "kernels" / "one.bin"
    assert compiling._kept(path) is None
    compiling._keep(path, b"machine code")
    assert compiling._kept(path) == b"machine code"
    assert list(path.parent.iterdir()) == [path]
    for content in (b"", path.read_bytes()[:-1], b"x" + path.read_bytes()[1:], path.read_bytes()[:32]):
        path.write_bytes(content)
        assert compiling._kept(path) is None, "it is compiled again"
    compiling._keep(path, b"other code")
    assert compiling._kept(path) == b"other code"


def test_a_folder_that_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "kernels").write_text("a file in the folder's place")
    compiling._keep(tmp_path / "kernels" / "one.bin", b"code")
    (tmp_path / "kernels").unlink()
    monkeypatch.setattr(compiling.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    compiling._keep(tmp_path / "kernels" / "one.bin", b"code")
    assert list((tmp_path / "kernels").iterdir()) == []


def fields(name: str) -> list[str]:
    """Of a struct of ring.cuh, in order."""
    body = re.search(rf"struct {name} \{{(.*?)\}};", (NATIVE / "ring.cuh").read_text(), re.S).group(1)
    lines = [line.partition("//")[0].strip().rstrip(";") for line in body.splitlines()]
    declared = [re.sub(r"^(const )?(long long|[A-Za-z0-9]+)", "", line) for line in lines if line]
    return [re.sub(r"[*\s]|\[.*\]", "", each) for line in declared for each in line.split(",")]


def test_structures_are_those_of_the_source():
    assert [name for name, *_ in persistent_step._Layer._fields_] == fields("Layer")
    step = persistent_step._step_type(2)
    assert [name for name, *_ in step._fields_] == fields("Step")
    assert ctypes.sizeof(step) == 2 * ctypes.sizeof(persistent_step._Layer) + 13 * 8 + 4 * 4
    assert ctypes.sizeof(persistent_step._step_type(128)) < 32_764, "more than a kernel's parameters may be"


def test_numbers_are_those_of_the_source():
    text = (NATIVE / "ring.cuh").read_text() + (NATIVE / "decode_step.cu").read_text()
    number = {
        name: int(re.search(rf"\b{name} = (\d+)", text).group(1))
        for name in ("CONSUMERS", "PRODUCERS", "TILE", "CHUNK", "PAD")
    }
    assert (number["CONSUMERS"], number["PRODUCERS"]) == (persistent_step._CONSUMERS, persistent_step._PRODUCERS)
    assert number["TILE"] * (number["CHUNK"] * 2 + number["PAD"]) == persistent_step._STAGE_BYTES
    assert f"sizeof(Small) <= {persistent_step._SMALL_BYTES // 1024} * 1024" in text


# -- on a GPU --------------------------------------------------------------------------------------------------------
def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


on_hopper = pytest.mark.skipif(not hopper(), reason="needs a GPU of compute capability 9.0")


def random_model(config: LlamaConfig) -> Llama:
    model = Llama.random(config, device="cuda", dtype=torch.bfloat16)
    for parameter in model.parameters():  # norms that are not one, biases that are not zero
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def filled_cache(model: Llama, lengths: Sequence[int]) -> tuple[vattn.KVCache, list[int]]:
    """Sequences of so many rows and one more, which is NaN; so is all behind them."""
    cache = vattn.KVCache(model.kv_layout(max(lengths) + 64), len(lengths) + 1, model.device)
    slots = [cache.acquire() for _ in lengths]
    cache.ensure_batch(slots, [length + 1 for length in lengths])
    for slot, length in zip(slots, lengths, strict=True):
        for layer in cache.layout.layers:
            for rows in cache.rows(slot, layer):
                rows.normal_()
                rows[length:] = float("nan")
    return cache, slots


def batch_of(cache: vattn.KVCache, slots: Sequence[int], lengths: Sequence[int]) -> DecodeBatch:
    at = torch.tensor([slots, lengths], dtype=torch.int32, device=cache.device)
    return DecodeBatch(at[0], at[1], at[1] + 1, cache.layout.max_seq_len)


def off_by(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def new_rows(cache: vattn.KVCache, slots: Sequence[int], lengths: Sequence[int]) -> list[torch.Tensor]:
    return [
        tensor[slot, length].clone()
        for layer in cache.layout.layers
        for tensor in (cache.k(layer), cache.v(layer))
        for slot, length in zip(slots, lengths, strict=True)
    ]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "lengths", [(0,), (2500,), (40, 900, 3), (64, 65, 1, 129, 700), tuple(range(3, 500, 70))], ids=len
)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_as_the_references_compute_it(name, lengths):
    device, shape = torch.device("cuda", torch.cuda.current_device()), step_shape(CONFIGS[name])
    if (reason := persistent_unavailable(device, torch.bfloat16, shape, len(lengths))) is not None:
        assert "activations" in reason
        pytest.skip(reason)
    torch.manual_seed(len(lengths))
    model = random_model(CONFIGS[name])
    cache, slots = filled_cache(model, lengths)
    with cache:
        batch = batch_of(cache, slots, lengths)
        residual = torch.randn(len(lengths), model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
        attention = bind(get("triton-decode"))
        exact = FusedLlama(model, cache.layout.max_seq_len, ops=reference_ops())
        expected = exact.decode(residual.clone(), batch, cache, attention)
        expected_rows = new_rows(cache, slots, lengths)
        for layer in cache.layout.layers:
            for slot, length in zip(slots, lengths, strict=True):
                cache.k(layer)[slot, length] = cache.v(layer)[slot, length] = float("nan")
        step = persistent_step_of(exact, cache, len(lengths))
        got = step(residual, batch.slots_int32, batch.rows_int32)
        assert got.isfinite().all()
        assert off_by(got, expected) < 0.02
        for one, other in zip(new_rows(cache, slots, lengths), expected_rows, strict=True):
            assert off_by(one, other) < 0.03
        again = step(residual, batch.slots_int32, batch.rows_int32)
        assert torch.equal(got, again), "sums are in a fixed order"


@pytest.mark.gpu
@on_hopper
@torch.no_grad()
def test_a_graph_of_it_serves_other_sequences():
    """Slots, rows and embeddings are read at each replay; one slot may stand in several places, as padding does."""
    model = random_model(SMALL)
    lengths = [70, 5, 300, 31, 8]
    cache, slots = filled_cache(model, lengths)
    with cache:
        fused = FusedLlama(model, cache.layout.max_seq_len)
        batch = batch_of(cache, slots[:3], lengths[:3])
        residual = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
        step = persistent_step_of(fused, cache, 4)
        step(residual, batch.slots_int32, batch.rows_int32)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(residual, batch.slots_int32, batch.rows_int32)
        for chosen in ([0, 1, 2], [4, 3, 0], [2, 2, 1], [1, 4, 4]):
            residual.normal_()
            batch.slots_int32.copy_(torch.tensor([slots[i] for i in chosen]))
            batch.rows_int32.copy_(torch.tensor([lengths[i] for i in chosen]))
            for i in range(3):  # equal rows for equal slots
                residual[i] = residual[chosen.index(chosen[i])]
            graph.replay()
            alone = [
                persistent_step_of(fused, cache, 1)(
                    residual[i : i + 1], batch.slots_int32[i : i + 1], batch.rows_int32[i : i + 1]
                )
                for i in range(3)
            ]
            assert off_by(logits, torch.cat(alone)) < 0.01


@pytest.mark.gpu
@on_hopper
def test_more_tokens_than_it_was_made_for():
    model = random_model(SMALL)
    cache, slots = filled_cache(model, [3, 4])
    with cache:
        step = persistent_step_of(FusedLlama(model), cache, 1)
        batch = batch_of(cache, slots, [3, 4])
        with pytest.raises(ConfigError, match="up to 1 tokens, got 2"):
            step(torch.zeros(2, 512, device="cuda", dtype=torch.bfloat16), batch.slots_int32, batch.rows_int32)


@pytest.mark.gpu
@on_hopper
def test_a_loop_that_takes_it(tmp_path, monkeypatch):
    """Greedy tokens are those of separate kernels, as long as the two likeliest are not nearly the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "vattn.decode.ways.time_in_turns",
        lambda timed, wait: {way: 1.0 if way == "graph + persistent" else 2.0 for way in timed},
    )
    model = random_model(SMALL)
    found = {}
    for mode in ("never", "measure"):
        with vattn.KVCache(model.kv_layout(256), 4, "cuda") as cache:
            slots = [cache.acquire() for _ in range(3)]
            cache.ensure_batch(slots, [1, 1, 1])
            for slot in slots:
                for layer in cache.layout.layers:
                    for rows in cache.rows(slot, layer):
                        rows.zero_()
            with DecodeLoop(FusedLlama(model), cache, graphs=mode, max_batch=3) as loop:
                for i, slot in enumerate(slots):
                    loop.start(slot, 7 + i, 24)
                steps = []
                while loop.step():
                    steps.append(loop.logits().float().sort(dim=-1))
                found[mode] = steps
                if mode == "measure":
                    assert {report.way for report in loop.graphs} == {"graph + persistent"}
    sure = torch.ones(3, dtype=torch.bool, device="cuda")
    for one, other in zip(found["never"], found["measure"], strict=False):
        if len(one.values) < 3 or len(other.values) < 3:
            break
        sure &= one.values[:, -1] - one.values[:, -2] > 0.05 * one.values.std(dim=-1)
        assert torch.equal(one.indices[sure, -1], other.indices[sure, -1])


@pytest.mark.gpu
@on_hopper
def test_it_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stages, x, _ = shared_memory(LLAMA_1B, 1, HOPPER_BYTES)
    names = ("HIDDEN", "HEADS", "KV_HEADS", "HEAD_DIM", "INTER", "VOCAB", "LAYERS")
    macros = dict(zip(names, (512, 8, 2, 64, 1408, 1000, 3), strict=True)) | {
        "TOKENS": 1,
        "STAGES": stages,
        "X_BYTES": x,
    }
    arguments = ("decode_step.cu", persistent_step.INCLUDED, macros, "sm_90a")
    code = compiling.compiled(*arguments)
    (kept,) = tmp_path.rglob("*.bin")
    assert kept.read_bytes().endswith(code)
    from cuda.bindings import nvrtc

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", lambda *_: pytest.fail("it was compiled again"))
    assert compiling.compiled(*arguments) == code
