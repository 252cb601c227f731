"""Tables of the experiments that compare layouts: one row a case, one column a system."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown
from tables_common import by_case, fields, records_of
from traces import MAX_SEQ_LEN, SHAPES

from vattn import KVLayout

Record = dict[str, Any]
WEIGHTS_70B = 2 * (70_553_706_496 - 128_256 * 8_192)  # bytes that a step reads, bfloat16: all but the input embedding


def _grid(records: list[Record], metric: str, unit: str, digits: int, ratio: str, columns: dict[str, str]) -> str:
    """The limit, then each column's fastest system, with the limit's share; how much longer the best ``ratio`` takes.

    Args:
        columns: heading -> a regular expression for its systems' names. All that were measured are in the records.
        ratio: one for the systems that vattn is compared with.
    """
    rows = []
    for case, values in by_case(records, metric).items():
        row = [case, f"{values['limit']:,.{digits}f}"]
        for pattern in columns.values():
            times = [value for system, value in values.items() if re.fullmatch(pattern, system)]
            row.append(f"{min(times):,.{digits}f} ({values['limit'] / min(times):.0%})" if times else "–")
        peers = {system: value for system, value in values.items() if re.fullmatch(ratio, system)}
        best = min(peers, key=peers.__getitem__, default=None)
        row.append("–" if best is None else f"{peers[best] / values['vattn']:.3f} ({best})")
        rows.append(row)
    header = ["case", f"limit, {unit}", *(f"{heading}, {unit}" for heading in columns)]
    return markdown([*header, "best of the others / vattn"], rows)


def _by_system(records: list[Record], metric: str, unit: str, digits: int) -> str:
    """One metric: a row for each case, a column for each system, a dash where there is none."""
    found = by_case(records, metric)
    systems = list(dict.fromkeys(system for values in found.values() for system in values))
    rows = [
        [case, *(f"{values[s]:,.{digits}f}" if s in values else "–" for s in systems)] for case, values in found.items()
    ]
    return markdown(["case", *(f"{system}, {unit}" for system in systems)], rows)


def decode_kernels(records: list[Record]) -> str:
    """Attention of a decode step, a layer: µs, and the limit's share of them."""
    columns = {
        "vattn": "vattn",
        "FA3 on vattn's layout": "vattn-flash-attn-3",
        "FA2 on vattn's layout": "vattn-flash-attn-2",
        "FA2 contiguous": "flash-attn-2-contiguous",
        "FA3 contiguous": "flash-attn-3-contiguous",
        "FA3 paged 16": "flash-attn-3-paged-16",
        "FA3 paged 256": "flash-attn-3-paged-256",
        "FA2 paged 256": "flash-attn-2-paged-256",
        "FlashInfer paged 16": "flashinfer.*-paged-16",
    }
    return _grid(records, "decode_attention", "µs", 1, r"(?!vattn).*-paged-\d+", columns)


def decode_plans(records: list[Record]) -> str:
    """What FlashInfer's ``plan`` takes the host, once a step: µs."""
    return _by_system(records, "plan", "µs", 0)


def decode_growth(records: list[Record]) -> str:
    """Least squares over all cases, relative errors: µs = launch + bytes / bandwidth; and what that says of a case that
    does not fit in one GPU."""
    found = by_case(records, "decode_attention")
    systems = list(dict.fromkeys(system for values in found.values() for system in values if system != "limit"))
    rows = []
    for system in systems:
        points = [(_batch_tokens(case) * 4096.0, values[system]) for case, values in found.items() if system in values]
        if len(points) < 6:
            continue
        size, us = np.array(points).T
        design = np.stack([1 / us, size / us], axis=1)  # each equation divided by what was measured
        (fixed, slope), *_ = np.linalg.lstsq(design, np.ones(len(us)), rcond=None)
        worst = float(np.abs((fixed + slope * size) / us - 1).max())
        far = (fixed + slope * 128 * 65536 * 4096) / 1e3
        rows.append([system, f"{fixed:.1f}", f"{1e-6 / slope:.2f}", f"{worst:.0%}", f"{far:.1f}"])
    return markdown(
        ["system", "launch, µs", "bandwidth, TB/s", "largest error of the fit", "128 × 65,536 extrapolated, ms"], rows
    )


def _batch_tokens(case: str) -> int:
    words = fields(case)
    return int(words["B"]) * int(words["L"])


def prefill_kernels(records: list[Record]) -> str:
    """Attention of prefill, a layer: ms, and the limit's share of them."""
    columns = {
        "vattn": "vattn",
        "FA3 contiguous": "flash-attn-3-contiguous",
        "FA3 paged 16": "flash-attn-3-paged-16",
        "FA3 paged 128": "flash-attn-3-paged-128",
        "FA3 paged 256": "flash-attn-3-paged-256",
        "FA2 paged 256": "flash-attn-2-paged-256",
        "FlashInfer paged 16": "flashinfer-paged-16",
    }
    return _grid(records, "prefill_attention", "ms", 3, r"(?!vattn).*-paged-\d+", columns)


def prefill_mapping(records: list[Record]) -> str:
    """With another prompt's pages mapped beside it: how many, and ratios within a round; and with its own before it.
    Medians and spread."""
    beside, inline = "vattn-mapping-beside", "vattn-mapping-inline"
    keys = [
        (beside, "mapping"),
        (beside, "prefill_attention"),
        (beside, "prefill_attention_ratio"),
        ("flash-attn-3-paged-16", "prefill_attention_ratio"),
        (inline, "prefill_attention"),
    ]
    found: dict[str, dict[tuple[str, str], Record]] = {}
    for record in records:
        if (key := (record["system"], record["metric"])) in keys:
            found.setdefault(record["case"], {})[key] = record
    rows = [
        [case, *(f"{r['value']:.3f} ({r['p20']:.3f}–{r['p80']:.3f})" if (r := cells.get(k)) else "–" for k in keys)]
        for case, cells in found.items()
    ]
    header = ["case", "pages mapped a ms", "vattn beside, ms", "beside / alone", "FA3 paged 16 / vattn beside"]
    return markdown([*header, "vattn inline, ms"], rows)


def prefill_calls(records: list[Record]) -> str:
    """One call over fresh pages: ms, with the spread."""
    rows = [
        [record["case"].split("call=")[1], f"{record['value']:.3f}", f"{record['p20']:.3f} to {record['p80']:.3f}"]
        for record in records
        if record["metric"] == "prefill_attention_call"
    ]
    return markdown(["call", "ms", "20th to 80th percentile"], rows)


def layout_steps(records: list[Record]) -> str:
    """A decode step end to end: ms, and the limit's share of them."""
    columns = {
        "vattn": "vattn",
        "FA3 on vattn's layout": "vattn-flash-attn-3",
        "FA2 on vattn's layout": "vattn-flash-attn-2",
        "FA3 paged 16": "paged-16",
        "FA3 paged 64": "paged-64",
        "FA3 paged 128": "paged-128",
        "FA3 paged 256": "paged-256",
        "FA2 paged 256": "paged-256-flash-attn-2",
    }
    return _grid(records, "decode_step", "ms", 3, "paged-.*", columns)


def step_growth(records: list[Record], smaller: list[Record] | None = None) -> str:
    """Least squares over all cases, relative errors: ms = factor x limit + layers x (fixed + batch x each); and what
    that says of cases that do not fit in one GPU.

    Args:
        smaller: records of models of other shapes, by default experiment 04's of the 1B. Without them a layer's part
            and a step's cannot be told apart.
    """
    if smaller is None:
        smaller = [r for r in records_of(Path(__file__).parent / "04_decode") if r["case"].startswith("1B ")]
    found = by_case([*records, *smaller], "decode_step")
    shapes = {case: (case.split()[0], int(fields(case)["B"])) for case in found}
    limits = np.array([(_batch_tokens(case), found[case]["limit"]) for case in found if shapes[case][0] == "8B"]).T
    ms_a_token, weights_ms = np.polyfit(*limits, 1)
    sharded_bytes = WEIGHTS_70B / 8 + 64 * 4096 * _kv_bytes("70B/8")
    far = {
        ("8B", 128): weights_ms + ms_a_token * 128 * 65536,
        ("70B/8", 64): ms_a_token / _kv_bytes("8B") * sharded_bytes,
    }
    rows = []
    systems = dict.fromkeys(system for values in found.values() for system in values if system != "limit")
    for system in sorted(systems, key=lambda name: name != "vattn"):
        cases = [case for case, values in found.items() if system in values]
        if len(cases) < 6:
            continue
        design = np.array([_terms(found[case]["limit"], *shapes[case]) for case in cases])
        ms = np.array([found[case][system] for case in cases])
        parts, *_ = np.linalg.lstsq(design / ms[:, None], np.ones(len(ms)), rcond=None)
        names = sorted({shapes[case][0] for case in cases}, reverse=True)
        rows.append(
            [
                system,
                ", ".join(names),
                *(f"{part:.{digits}f}" for part, digits in zip(parts * (1, 1e3, 1e3), (3, 1, 2), strict=True)),
                f"{np.abs(design @ parts / ms - 1).max():.1%}",
                *(f"{parts @ _terms(limit, *shape):,.1f}" for shape, limit in far.items()),
            ]
        )
    header = ["system", "fitted to", "times the limit", "and a layer, µs", "and a sequence in a layer, µs"]
    header += ["largest error of the fit", "8B, 128 × 65,536, ms", "70B on 8 GPUs, 64 × 4,096, ms"]
    return markdown(header, rows)


def _terms(limit: float, name: str, batch: int) -> tuple[float, float, float]:
    layers = SHAPES[name][0]
    return limit, layers, layers * batch


def _kv_bytes(name: str) -> int:
    """Of a token, in all layers."""
    return KVLayout(*SHAPES[name], MAX_SEQ_LEN, torch.bfloat16).bytes_per_token


def layout_host(records: list[Record]) -> str:
    """The host's time for the pages or blocks of a step: median and mean, µs."""
    medians, means = by_case(records, "host_step"), by_case(records, "host_step_mean")
    systems = list(dict.fromkeys(system for values in medians.values() for system in values))
    rows = [[case, *(f"{values[s]:.0f} ({means[case][s]:.0f})" for s in systems)] for case, values in medians.items()]
    return markdown(["case", *(f"{system}, µs" for system in systems)], rows)


def layout_prefill(records: list[Record]) -> str:
    """Prefill end to end: ms, and the limit's share of them."""
    columns = {
        "vattn": "vattn",
        "vattn, parked pages": "vattn-parked",
        "vattn, mapping first": "vattn-sync-mapping",
        "vattn, pages of 16 MiB": "vattn-16MiB-pages",
        "paged 16": "paged-16",
        "paged 256": "paged-256",
    }
    return _grid(records, "prefill", "ms", 1, r"paged-\d+", columns)


def layout_prefill_first(records: list[Record]) -> str:
    """The first prompt of a cache, whose pages have to be made: ms."""
    return _by_system(records, "prefill_first", "ms", 1)


LAYOUT_TABLES: dict[str, Callable[[list[Record]], str]] = {
    function.__name__: function
    for function in (
        *(decode_kernels, decode_plans, decode_growth, prefill_kernels, prefill_mapping, prefill_calls),
        *(layout_steps, step_growth, layout_host, layout_prefill, layout_prefill_first),
    )
}
