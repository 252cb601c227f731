"""Tables and figures of made-up records: above all, that the ratio is to the best peer, lost or won; and the fits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import render
import table

EXPERIMENTS = table.FOLDER


def records(metric, case="8B B=1 L=1024", unit="ms", gpu="none", **values):
    return [
        {"case": case, "system": name.replace("_", "-"), "metric": metric, "unit": unit, "gpu": gpu}
        | {"value": value, "p20": value, "p80": value}
        for name, value in values.items()
    ]


def rows(made):
    """Cells of each row, the header first."""
    lines = made.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


def marker(experiment, metric):
    """The arguments of the README's table whose records are of this metric and whose last column is the best peer."""
    text = (EXPERIMENTS / experiment / "README.md").read_text()
    (found,) = (m for _, m, _ in render._TABLE.findall(text) if f"where={metric} " in m and "best=" in m)
    return found.split()[1:]


@pytest.mark.parametrize(
    ("experiment", "metric", "peers"),
    [
        (
            "07_decode_attention",
            "decode_attention",
            ["flash-attn-3-paged-16", "flash-attn-2-paged-256", "flashinfer-tensor-cores-paged-64"],
        ),
        (
            "08_prefill_attention",
            "prefill_attention",
            ["flash-attn-3-paged-16", "flash-attn-3-paged-128", "flashinfer-paged-16"],
        ),
        ("10_layouts", "decode_step", ["paged-16", "paged-128", "paged-256-flash-attn-2"]),
        ("11_prefill", "prefill", ["paged-16", "paged-256"]),
    ],
)
def test_the_ratio_is_to_the_best_paged_peer(experiment, metric, peers):
    def last_cell(values):
        return rows(table.pivot(records(metric, **values), *marker(experiment, metric)))[1][-1]

    for best in peers:
        values = {"limit": 1.0, "vattn": 2.0, "flash-attn-3-contiguous": 0.5, "vattn-flash-attn-3": 0.6}
        values |= dict.fromkeys(peers, 3.0)
        assert last_cell(values).startswith("1.500 (")
        values[best] = 1.8
        assert last_cell(values) == f"0.900 ({best})"


def test_what_was_not_measured_is_a_dash():
    made = table.pivot(records("decode_step", limit=1.0, vattn=2.0), *marker("10_layouts", "decode_step"))
    header, row = rows(made)
    assert row[:3] == ["8B B=1 L=1024", "1.000", "2.000 (50%)"]
    assert set(row[3:]) == {"–"}
    assert len(row) == len(header)


def test_a_selector_takes_system_metric_and_words():
    made = records("time", "one crossing=1%", a=1.0, b=2.0) + records("size", "two", unit="MiB", a=3.4)
    made += records("time", "one crossing=10%", b=9.0)
    header, *lines = rows(table.pivot(made, "case", "a:time,b:crossing=1%,size"))
    assert header == ["case", "a time, ms", "b crossing=1%, ms", "size, MiB"]
    assert lines == [["one crossing=1%", "1.000", "2.000", "–"], ["two", "–", "–", "3"]]
    assert table.by_case(made, "time:one crossing=1%") == {"one crossing=1%": {"a": 1.0, "b": 2.0}}


def test_a_heading_has_the_unit_once():
    made = records("step", unit="us", contiguous=1.0) + records("driver_calls", unit="calls", vattn=3.0)
    assert rows(table.pivot(made, "case", "contiguous,driver_calls"))[0] == ["case", "contiguous, µs", "driver calls"]


def test_two_records_in_a_cell_are_an_error():
    made = records("step", "8B B=8", vattn=1.0) + records("step", "8B B=8 staggered", vattn=2.0)
    with pytest.raises(SystemExit, match="'vattn' has two records: vattn, step, '8B B=8'; vattn, step, '8B B=8 stag"):
        table.pivot(made, "B", "vattn")
    assert len(rows(table.pivot(made, "case", "vattn"))) == 3
    assert table.pivot(made, "B", "nobody") == table.pivot(made, "B", "vattn", "where=nobody") == ""
    assert rows(table.pivot(made, "B", "vattn", "where=8B.B=8"))[1] == ["8", "1.000"]


def test_a_row_is_named_by_words_with_its_limit_wherever_it_stands():
    made = records("step", "8B B=8 L=2048", limit=5.0) + records("step", "new B=8 L=2048", vattn=10.0)
    made += records("step", "8B B=8 L=2048 max=4096", vattn=20.0) + records("step", "8B B=8 L=1", limit=1.0)
    header, *lines = rows(table.pivot(made, "B,L,max", "limit,vattn", "where=step", "share"))
    assert header == ["batch", "tokens", "maximum", "limit, ms", "vattn, ms"]
    assert lines == [["8", "2,048", "–", "5.000", "10.00 (50%)"], ["8", "2,048", "4,096", "–", "20.00"]]


def test_a_spread_is_shown_where_there_is_one():
    (record,) = records("step", vattn=3.0)
    assert rows(table.pivot([record], "system", "step", "spread"))[1] == ["vattn", "3.000"]
    record |= {"p20": 2.5, "p80": 12.25}
    assert rows(table.pivot([record], "system", "step", "spread"))[1] == ["vattn", "3.000 (2.500–12.25)"]


def test_several_machines_are_a_column():
    made = records("step", vattn=1.0) + records("step", gpu="NVIDIA H100 80GB HBM3", vattn=2.0)
    assert rows(table.pivot(made, "system", "step"))[1:] == [
        ["CPU only", "vattn", "1.000"],
        ["NVIDIA H100", "vattn", "2.000"],
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0084, "ms", "0.008"),
        (9.9996, "ms", "10.000"),
        (66.141, "calls/request", "66.14"),
        (-412.34, "µs", "-412.3"),
        (256788.0, "us", "256,788"),
        (216.8, "sequences", "217"),
    ],
)
def test_numbers_have_four_digits(value, unit, text):
    assert table.number(value, unit) == text


def test_a_figure_is_the_range_over_all_cases():
    made = records("step", "A", vattn=2.0, paged_16=3.0, paged_256=1.9) + records("step", "B", vattn=2.0, paged_16=2.2)
    made += records("step", "C", vattn=7.0) + records("other", "A", vattn=100.0)
    assert table.figure(made, "step", "vattn", ".1f") == "2.0 to 7.0"
    assert table.figure(made, "step", "paged-.*", ".1f") == "1.9 to 3.0"
    assert table.figure(made, "step", "paged-.*/vattn", ".2f") == "0.95 to 1.10"  # the best of each case
    assert table.figure(made, "step:B", "paged-16/vattn", ".0%") == "110%"
    assert table.figure(made, "step", "vattn", ".4f/1000") == "0.0020 to 0.0070"
    assert table.figure(made, "step", "nobody", ".1f") == table.figure(made, "step:C", "paged-16/vattn") == "–"


def test_a_second_run_is_compared_by_metric():
    first = records("prefill", limit=1.0, vattn=2.0, paged_16=4.0)
    for record, again, spread in zip(first, (1.0, 2.1, 3.2), (0.0, 0.5, 0.1), strict=True):
        record |= {"again": again, "p20": record["value"] - spread / 2, "p80": record["value"] + spread / 2}
    made = render.again(first)
    assert "| prefill | 2 | 2.5%, 25.0% |" in made
    assert "0.800 (8B B=1 L=1024, paged-16)" in made


def test_an_ablation_is_what_it_adds():
    made = records("decode_step", vattn=5.0, vattn_no_graph=6.0, vattn_eager_norm=4.9, torch_compile=9.0)
    ablations = render.report(EXPERIMENTS / "04_decode").ablations
    assert rows(ablations(made))[1:] == [["vattn-no-graph", "+1000 (+20.0%)"], ["vattn-eager-norm", "-100 (-2.0%)"]]


def test_a_fit_of_growth_finds_what_made_it():
    made = []
    for batch in (1, 8, 32):
        for length in (1024, 4096, 16384):
            us = 7.0 + batch * length * 4096 / 3.0e6
            made += records("decode_attention", f"8B B={batch} L={length}", vattn=us, limit=1.0)
    assert rows(render.report(EXPERIMENTS / "07_decode_attention").growth(made))[1][:4] == [
        "vattn",
        "7.0",
        "3.00",
        "0%",
    ]


def steps_of(name, layers, kv_bytes, weights, batches, parts):
    """Steps at 3 TB/s that take exactly these parts: of the limit, ms a layer, ms a sequence in a layer."""
    for batch in batches:
        for length in (1024, 4096):
            limit = (weights + batch * length * kv_bytes) / 3e9
            ms = parts[0] * limit + layers * (parts[1] + batch * parts[2])
            yield from records("decode_step", f"{name} B={batch} L={length}", vattn=ms, limit=limit)


def test_a_fit_of_steps_tells_layers_and_sequences_apart():
    render.report(EXPERIMENTS / "10_layouts")
    from step_growth import WEIGHTS_70B, Steps

    parts = (1.02, 0.016, 0.0005)
    made = list(steps_of("8B", 32, 131072, 15e9, (1, 8, 64), parts))
    assert Steps(table.by_case(made, "decode_step")).fit("vattn").shapes == ("8B",)
    made += steps_of("1B", 16, 32768, 2.5e9, (1, 16), parts)
    fit = Steps(table.by_case(made, "decode_step")).fit("vattn")
    far = 1.02 * (15e9 + 128 * 65536 * 131072) / 3e9 + 32 * (0.016 + 128 * 0.0005)
    sharded = 1.02 * (WEIGHTS_70B / 8 + 64 * 4096 * 40960) / 3e9 + 80 * (0.016 + 64 * 0.0005)
    assert fit.shapes == ("8B", "1B")
    assert (fit.times_limit, fit.layer_us, fit.sequence_us) == pytest.approx((1.02, 16.0, 0.5))
    assert list(fit.far_ms.values()) == pytest.approx([far, sharded])
    assert fit.largest_error < 1e-9


def test_steps_of_the_smaller_model_come_from_its_own_experiment():
    made = list(steps_of("8B", 32, 131072, 15e9, (1, 8, 64), (1.0, 0.016, 0.0005)))
    assert rows(render.report(EXPERIMENTS / "10_layouts").growth(made))[1][:2] == ["vattn", "8B, 1B"]
