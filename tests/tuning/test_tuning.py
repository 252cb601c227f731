"""Which kernel is taken where: the nearest measurement that runs there and that the cache has a margin for."""

from __future__ import annotations

import pytest
import torch

from vattn import KVLayout, LayerGroup
from vattn.attention import TritonDecodeAttention, get
from vattn.decode.graphs import StepGraphs, default_buckets
from vattn.errors import ConfigError
from vattn.tuning.measure import measure_attention, measure_linear, measure_prefill
from vattn.tuning.table import (
    TuningTable,
    _read_for,
    default_attention,
    default_decode,
    default_ops,
    table_for,
    table_paths,
    table_to_add_to,
)

LAYOUT = KVLayout(4, 8, 128, 4096, torch.bfloat16)
CPU = torch.device("cpu")


def record(batch, context, backend, **options):
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return {**shape, "batch": batch, "context": context, "backend": backend, "options": options, "us": {backend: 1.0}}


def table():
    made = TuningTable("GPU", pdl=True)
    made.add(
        "attention",
        [
            record(1, 1024, "triton-decode", block_n=32, num_warps=2),
            record(64, 1024, "flash-attn-2"),
            record(8, 8192, "flash-attn-3"),
        ],
    )
    return made


@pytest.mark.parametrize(
    ("batch", "context", "name"),
    [
        (1, 1024, "triton-decode"),
        (2, 500, "triton-decode"),
        (64, 1000, "flash-attn-2"),
        (300, 2000, "flash-attn-2"),
        (8, 100_000, "flash-attn-3"),
        (7, 6000, "flash-attn-3"),
    ],
)
def test_the_nearest_measurement(batch, context, name):
    (found,) = table().decode_backends(32, LAYOUT, batch, context)
    assert found.name == name
    if name == "triton-decode":
        assert found == TritonDecodeAttention(block_n=32, num_warps=2, pdl=True)


def test_other_shapes_were_not_measured():
    assert table().decode_backends(16, LAYOUT, 1, 1024) == []
    assert table().decode_backends(32, KVLayout(4, 8, 64, 4096, torch.bfloat16), 1, 1024) == []
    assert table().decode_backends(32, KVLayout(4, 8, 128, 4096, torch.float16), 1, 1024) == []
    groups = [LayerGroup([0], 8, 128), LayerGroup([1], 8, 64)]
    mixed = KVLayout(groups=groups, max_seq_len=64, dtype=torch.bfloat16)
    assert table().decode_backends(32, mixed, 1, 9) == prefill_table().prefill_backends(32, mixed, 9, 9) == []
    assert TuningTable("GPU").decode_backends(32, LAYOUT, 1, 1024) == []


def test_a_new_measurement_takes_the_place_of_the_old():
    made = table()
    made.add("attention", [record(1, 1024, "torch-varlen"), record(2, 1024, "flash-attn-2")])
    assert len(made.attention) == 4
    assert made.decode_backends(32, LAYOUT, 1, 1024) == [get("torch-varlen")]


def test_on_the_cpu_everything_is_eager():
    assert default_ops(CPU, torch.float32).name == "reference"
    assert default_decode(LAYOUT, CPU, 1, 100, 32).name == "sdpa"
    assert default_decode(LAYOUT, CPU, 1, 100, 32, max_over_read=0).name == "sdpa"


def prefill_table():
    made = TuningTable("GPU")
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    made.add(
        "prefill",
        [
            {**shape, "new": 512, "total": 512, "us": {"reference": 2.0, "sdpa": 3.0, "flash-attn-3": 1.0}},
            {**shape, "new": 2048, "total": 2048, "us": {"reference": 4.0, "sdpa": 3.0, "flash-attn-3": 1.0}},
            {**shape, "new": 2048, "total": 32768, "us": {"reference": 4.0, "sdpa": 5.0, "flash-attn-3": 1.0}},
        ],
    )
    return made


@pytest.mark.parametrize(
    ("new", "total", "name"),
    [(400, None, "reference+sdpa"), (4000, None, "sdpa"), (4000, 30_000, "reference+sdpa"), (2048, 2048, "sdpa")],
)
def test_the_nearest_prefill_of_what_runs_here(monkeypatch, new, total, name):
    """FlashAttention-3 was fastest everywhere, and does not run on a CPU."""
    monkeypatch.setattr("vattn.tuning.table.table_for", lambda device: prefill_table())
    assert default_attention(LAYOUT, CPU, 32, new=new, total=total).name == name
    assert default_attention(LAYOUT, CPU, 16, new=new, total=total).name == "sdpa"  # other heads


def test_a_prefill_measured_again(tmp_path):
    made = prefill_table()
    made.add("prefill", [{**made.prefill[0], "us": {"sdpa": 1.0}}])
    assert [record["us"] for record in made.prefill if record["new"] == 512] == [{"sdpa": 1.0}]
    made.write(tmp_path / "table.json")
    assert TuningTable.read(tmp_path / "table.json") == made


@pytest.mark.gpu
def test_prefill_is_measured_on_a_gpu(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    records = measure_prefill(8, 2, 64, torch.bfloat16, device, [(300, 300), (100, 900)])
    assert [(record["new"], record["total"]) for record in records] == [(300, 300), (100, 900)]
    assert all(us > 0 for record in records for us in record["us"].values())
    made = TuningTable("GPU")
    made.add("prefill", records)
    monkeypatch.setattr("vattn.tuning.table.table_for", lambda device: made)
    layout = KVLayout(4, 2, 64, 1024, torch.bfloat16)
    found = default_attention(layout, device, 8, new=100, total=900)
    assert found.name.split("+")[0] == min(records[1]["us"], key=records[1]["us"].get)
    within = {name: us for name, us in records[1]["us"].items() if name != "flash-attn-3"}
    found = default_attention(layout, device, 8, max_over_read=0, new=100, total=900)
    assert found.name.split("+")[0] == min(within, key=within.get)


@pytest.mark.gpu
def test_choices_on_a_gpu(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr("vattn.tuning.table.table_for", lambda device: table())
    assert default_decode(LAYOUT, device, 1, 1024, 32, max_over_read=0).name == "triton-decode"
    # Nearest is FlashAttention-3, which needs a margin.
    assert default_decode(LAYOUT, device, 8, 8192, 32, max_over_read=0).name == "triton-decode"
    assert default_ops(device, torch.bfloat16).name == "fused"
    if get("flash-attn-3").supports(device, torch.bfloat16, 128) is None:
        assert default_decode(LAYOUT, device, 8, 8192, 32).name == "flash-attn-3"
        assert default_decode(LAYOUT, device, 8, 8192, 32, max_over_read=191).name == "flash-attn-3"


@pytest.mark.gpu
def test_measurements():
    linear = measure_linear(256, 512, [1, 4], torch.bfloat16, torch.device("cuda"))
    assert [each["tokens"] for each in linear] == [1, 4]
    assert all(0 < each["us"] <= each["cublas_us"] * 1.01 for each in linear)
    (attention,) = measure_attention(8, 2, 64, torch.bfloat16, torch.device("cuda"), [(2, 300)])
    assert attention["us"]["triton-decode"] > 0
    assert attention["us"][attention["backend"]] == min(attention["us"].values())


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_the_shipped_tables_are_read(name):
    _, shipped = table_paths(name)
    found = TuningTable.read(shipped)
    assert (found.gpu, found.capability, found.pdl) == (name, (9, 0), True)
    products = found.linear_table(torch.bfloat16)
    for outputs, inputs, swiglu in products.entries:
        for tokens in (1, 2, 5, 8, 32, 64):
            config = products.find(outputs, inputs, tokens, swiglu)
            # SwiGLU, and the logits that are sampled from, need whole sums.
            assert config is None or config.splits == 1 or not (swiglu or outputs > 100_000)
            assert config is None or config.dot or tokens == 1
    assert products.find(6144, 4096, 1).dot is False
    assert products.find(6144, 4096, 5).dot
    assert len(found.decode_backends(32, LAYOUT, 1, 1024)) == 1
    assert table_for(CPU).attention == []


@pytest.mark.parametrize(
    ("gpu", "capability", "measured_on"),
    [
        ("NVIDIA GH200 480GB", (9, 0), "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H200", (9, 0), "NVIDIA H200"),
        ("NVIDIA H200 NVL", (9, 0), "NVIDIA H200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "NVIDIA H100 80GB HBM3"),
        ("NVIDIA L40S", (8, 9), "NVIDIA L40S"),
    ],
)
def test_a_gpu_without_a_table_takes_that_of_another_of_its_capability(
    gpu, capability, measured_on, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: gpu)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("vattn.tuning.table._read_for", _read_for.__wrapped__)  # without what it remembers
    device = torch.device("cuda", 0)
    found = table_for(device)
    assert found.gpu == measured_on
    assert bool(found.linear) == bool(found.attention) == found.pdl == (measured_on != "NVIDIA L40S")
    # What is measured on this GPU is its own, beside what is known of the other.
    own = table_to_add_to(device)
    assert (own.gpu, own.capability, own.pdl) == (gpu, capability, capability >= (9, 0))
    assert own.linear == found.linear
    own.add("attention", [record(1, 1024, "torch-varlen")])
    own.write(table_paths(gpu)[0])
    assert table_for(device) == own != found
    assert table_for(device).decode_backends(32, LAYOUT, 1, 1024) == [get("torch-varlen")]
    assert own.based_on == (None if measured_on == gpu else measured_on)
    # One of an older version has what was measured alone, and the rest is as without it.
    older = TuningTable(gpu, attention=[record(1, 1024, "flash-attn-2")], pdl=found.pdl)
    older.write(table_paths(gpu)[0])
    both = table_for(device)
    assert both.decode_backends(32, LAYOUT, 1, 1024) == [get("flash-attn-2")]
    assert (both.linear, both.prefill, both.based_on) == (found.linear, found.prefill, own.based_on)
    assert len(both.attention) == max(1, len(found.attention))


@pytest.mark.parametrize("text", ["[1]", "{", '{"gpu": "X", "linear": 5}', '{"gpu": "X", "linear": [{}]}',
                                  '{"gpu": "X", "capability": {"a": 1}}', '{"gpu": "X", "new": 1}'])  # fmt: skip
def test_what_is_no_table(text, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no tuning table"):
        TuningTable.read(path)


@pytest.mark.parametrize("max_batch", [1, 2, 15, 16, 17, 40, 64, 100, 256])
def test_buckets(max_batch):
    buckets = default_buckets(max_batch)
    assert buckets == tuple(sorted(set(buckets)))
    assert buckets[-1] == max_batch
    assert set(range(1, min(max_batch, 16) + 1)) <= set(buckets)
    graphs = StepGraphs(lambda batch: None, buckets, CPU, "never")
    for batch in range(1, max_batch + 1):
        found = graphs.bucket_for(batch)
        assert batch <= found <= max(batch * 1.25, batch + 1)
    with pytest.raises(ConfigError, match="exceeds"):
        graphs.bucket_for(max_batch + 1)
