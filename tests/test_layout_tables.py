"""The tables that compare layouts, on made-up records: above all, that the ratio is to the best peer, lost or won."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import tables
import tables_layouts


def records(metric, **values):
    return [
        {"case": "8B B=1 L=1024", "system": system.replace("_", "-"), "metric": metric, "value": value}
        for system, value in values.items()
    ]


def last_cell(table):
    return table.splitlines()[2].rsplit("|", 2)[1].strip()


@pytest.mark.parametrize(
    ("make", "metric", "peers"),
    [
        (
            tables_layouts.decode_kernels,
            "decode_attention",
            ["flash-attn-3-paged-16", "flash-attn-2-paged-256", "flashinfer-tensor-cores-paged-64"],
        ),
        (
            tables_layouts.prefill_kernels,
            "prefill_attention",
            ["flash-attn-3-paged-16", "flash-attn-3-paged-128", "flashinfer-paged-16"],
        ),
        (tables_layouts.layout_steps, "decode_step", ["paged-16", "paged-128", "paged-256-flash-attn-2"]),
        (tables_layouts.layout_prefill, "prefill", ["paged-16", "paged-256"]),
    ],
)
def test_the_ratio_is_to_the_best_paged_peer(make, metric, peers):
    for best in peers:
        values = {"limit": 1.0, "vattn": 2.0, "flash-attn-3-contiguous": 0.5, "vattn-flash-attn-3": 0.6}
        values |= dict.fromkeys(peers, 3.0)
        assert last_cell(make(records(metric, **values))).startswith("1.500 (")
        values[best] = 1.8
        assert last_cell(make(records(metric, **values))) == f"0.900 ({best})"


def test_a_column_takes_its_fastest_system():
    values = {"limit": 1.0, "vattn": 2.0, "flashinfer-paged-16": 4.0, "flashinfer-tensor-cores-paged-16": 2.5}
    table = tables_layouts.decode_kernels(records("decode_attention", **values))
    assert "| 2.5 (40%) |" in table
    assert "4.0" not in table


def test_what_was_not_measured_is_a_dash():
    table = tables_layouts.layout_steps(records("decode_step", limit=1.0, vattn=2.0))
    assert last_cell(table) == "–"
    assert table.splitlines()[2].count("–") == len(table.splitlines()[0].split("|")) - 5


def test_a_fit_of_growth_finds_what_made_it():
    made = []
    for batch in (1, 8, 32):
        for length in (1024, 4096, 16384):
            us = 7.0 + batch * length * 4096 / 3.0e6
            case = {"case": f"8B B={batch} L={length}", "metric": "decode_attention"}
            made += [{**case, "system": "vattn", "value": us}, {**case, "system": "limit", "value": 1.0}]
    row = tables_layouts.decode_growth(made).splitlines()[2]
    assert "| 7.0 | 3.00 | 0% |" in row


def steps_of(name, layers, kv_bytes, weights, batches, system, parts):
    """Steps at 3 TB/s that take exactly these parts: of the limit, ms a layer, ms a sequence in a layer."""
    for batch in batches:
        for length in (1024, 4096):
            limit = (weights + batch * length * kv_bytes) / 3e9
            ms = parts[0] * limit + layers * (parts[1] + batch * parts[2])
            case = {"case": f"{name} B={batch} L={length}", "metric": "decode_step"}
            yield from ({**case, "system": system, "value": ms}, {**case, "system": "limit", "value": limit})


def test_a_fit_of_steps_tells_layers_and_sequences_apart():
    parts = (1.02, 0.016, 0.0005)
    larger = list(steps_of("8B", 32, 131072, 15e9, (1, 8, 64), "vattn", parts))
    smaller = list(steps_of("1B", 16, 32768, 2.5e9, (1, 16), "vattn", parts))
    row = tables_layouts.step_growth(larger, smaller).splitlines()[2]
    far = 1.02 * (15e9 + 128 * 65536 * 131072) / 3e9 + 32 * (0.016 + 128 * 0.0005)
    sharded = 1.02 * (tables_layouts.WEIGHTS_70B / 8 + 64 * 4096 * 40960) / 3e9 + 80 * (0.016 + 64 * 0.0005)
    assert row == f"| vattn | 8B, 1B | 1.020 | 16.0 | 0.50 | 0.0% | {far:,.1f} | {sharded:.1f} |"
    assert "| 8B | 1.020 |" in tables_layouts.step_growth(larger, [])


def test_steps_of_the_smaller_model_come_from_its_own_experiment():
    made = list(steps_of("8B", 32, 131072, 15e9, (1, 8, 64), "vattn", (1.0, 0.016, 0.0005)))
    assert "| vattn | 8B, 1B |" in tables_layouts.step_growth(made)


def test_a_second_run_is_compared_by_metric():
    first = records("prefill", limit=1.0, vattn=2.0, paged_16=4.0)
    for record, again, spread in zip(first, (1.0, 2.1, 3.2), (0.0, 0.5, 0.1), strict=True):
        record |= {"again": again, "p20": record["value"] - spread / 2, "p80": record["value"] + spread / 2}
    table = tables.again(first)
    assert "| prefill | 2 | 2.5%, 25.0% |" in table
    assert "0.800 (8B B=1 L=1024, paged-16)" in table


def test_mapping_beside_a_prefill_is_a_row_of_ratios():
    spread = {"p20": 0.9, "p80": 1.3}
    found = [
        {**records("mapping", vattn_mapping_beside=7.0)[0], **spread},
        {**records("prefill_attention_ratio", vattn_mapping_beside=1.001)[0], **spread},
        {**records("prefill_attention_ratio", flash_attn_3_paged_16=1.14)[0], **spread},
        {**records("prefill_attention", vattn_mapping_inline=4.5)[0], **spread},
        {**records("prefill_attention", vattn=3.0)[0], **spread},
    ]
    cells = [
        "8B B=1 L=1024",
        *("–" if x is None else f"{x} (0.900–1.300)" for x in ("7.000", None, "1.001", "1.140", "4.500")),
    ]
    assert tables_layouts.prefill_mapping(found).splitlines()[2] == f"| {' | '.join(cells)} |"
    assert last_cell(tables_layouts.prefill_mapping(found[:2])) == "–"
