"""One line an experiment: the question, what came out, and on what; made of the records of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import markdown, read

Record = dict[str, Any]
Values = dict[tuple[str, str, str], float]  # (case, system, metric) -> value
FOLDER = Path(__file__).parent


def _span(values: list[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _over(values: Values, metric: str, over: str, under: str) -> list[float]:
    """The ratio of two systems in every case that has both."""
    return [
        value / values[case, under, metric]
        for (case, system, name), value in values.items()
        if name == metric and system == over and (case, under, metric) in values
    ]


def _best_paged(values: Values, metric: str) -> list[float]:
    """The fastest paged system's time over vattn's, in every case."""
    cases = dict.fromkeys(case for case, system, name in values if name == metric and system == "vattn")
    paged = {
        case: [v for (c, system, name), v in values.items() if c == case and name == metric and "paged-" in system]
        for case in cases
    }
    return [min(times) / values[case, "vattn", metric] for case, times in paged.items() if times]


def _allocator(values: Values) -> str:
    case = "driver=ledger slots=1024 layers=32 crossing="
    return (
        f"Python: {values[f'{case}all', 'vattn', 'per_page']:.1f} µs a page in large batches, "
        f"{values[f'{case}none', 'vattn', 'ensure_batch']:.0f} µs a step of 1,024 slots that maps none"
    )


def _hf_memory(values: Values) -> str:
    new = _over(values, "decode_step", "transformers-dynamic", "vattn")
    ratios = [value for (_, _, metric), value in values.items() if metric == "step_ratio"]
    memory = _over(values, "peak_memory", "vattn", "transformers-dynamic")
    return (
        f"{_span(memory)} of the dynamic cache's memory beyond the weights; eager steps {_span(new, 1)} times faster "
        f"at a new length, {_span(ratios)} of its time at known ones"
    )


def _decode(values: Values) -> str:
    shares = [1 / ratio for ratio in _over(values, "decode_step", "vattn", "limit")]
    compiled = _over(values, "decode_step", "torch-compile", "vattn")
    return f"{min(shares):.0%} to {max(shares):.0%} of the limit; torch.compile takes {_span(compiled)} times as long"


def _capacity(values: Values) -> str:
    paged, layers = (
        [value for (_, _, metric), value in values.items() if metric == f"over_{other}"]
        for other in ("paged-16", "layer-major")
    )
    return f"{_span(paged, 3)} of what blocks of 16 tokens hold, {_span(layers)} of what pages of one layer do"


def _sharing(values: Values) -> str:
    calls = values["serving lengths=bounded limit=4", "vattn", "calls_mean"]
    return f"{calls:.3f} driver calls a request where every slot can keep what it has"


def _decode_attention(values: Values) -> str:
    return f"best paged kernel / vattn: {_span(_best_paged(values, 'decode_attention'))}"


def _prefill_attention(values: Values) -> str:
    ratios = _over(values, "prefill_attention", "flash-attn-3-paged-16", "vattn")
    return f"FlashAttention-3 on blocks of 16 / on vattn's layout: {_span(ratios)}"


def _page_size(values: Values) -> str:
    pages = {case: value for (case, system, metric), value in values.items() if (system, metric) == ("vattn", "waste")}
    waste = [value for case, value in pages.items() if case.endswith("page=2048KiB")]
    return f"pages of 2 MiB waste {min(waste):.1%} to {max(waste):.1%}"


def _layouts(values: Values) -> str:
    return f"best paged step / vattn's: {_span(_best_paged(values, 'decode_step'), 3)}"


def _prefill(values: Values) -> str:
    return f"blocks of 16 / vattn, mapping included: {_span(_over(values, 'prefill', 'paged-16', 'vattn'))}"


HEADLINES: dict[str, Callable[[Values], str]] = {
    "02_allocator": _allocator,
    "03_hf_memory": _hf_memory,
    "04_decode": _decode,
    "05_capacity": _capacity,
    "06_sharing": _sharing,
    "07_decode_attention": _decode_attention,
    "08_prefill_attention": _prefill_attention,
    "09_page_size": _page_size,
    "10_layouts": _layouts,
    "11_prefill": _prefill,
}


def _headline(experiment: str, values: Values) -> str:
    """A dash where it is not known what the experiment's records say, or they have not all that it takes."""
    try:
        return HEADLINES[experiment](values)
    except (KeyError, ValueError):
        return "–"


def overview(_records: list[Record]) -> str:
    """Experiment, question, what came out, machine, runs and their newest date."""
    rows = []
    for folder in sorted(path.parent for path in FOLDER.glob("*/README.md")):
        question = (folder / "README.md").read_text().partition("\n")[0].removeprefix("# ")
        link = f"[{folder.name}]({folder.name})"
        results = folder / "results.jsonl"
        if not results.exists():
            own_run = (folder / "run.py").exists()
            rows.append([link, question, "not measured yet" if own_run else "made of the others' records", "–", "–"])
            continue
        records = read(results)
        values = {(record["case"], record["system"], record["metric"]): record["value"] for record in records}
        machines = dict.fromkeys("CPU" if r["gpu"] == "none" else r["gpu"].split(" 80GB")[0] for r in records)
        second = folder / "again.jsonl"
        runs = "2" if second.exists() else "1"
        newest = max(record["date"] for record in (*records, *(read(second) if second.exists() else ())))
        rows.append([link, question, _headline(folder.name, values), ", ".join(machines), f"{runs}, {newest}"])
    return markdown(["experiment", "question", "what came out", "machine", "runs, newest"], rows)


def _measured(experiment: str) -> Values:
    path = FOLDER / experiment / "results.jsonl"
    records = read(path) if path.exists() else []
    return {(record["case"], record["system"], record["metric"]): record["value"] for record in records}


def _step_rows() -> list[list[str]]:
    values, rows = _measured("04_decode"), []
    for case in ("8B B=1 L=1024", "8B B=8 L=1024", "8B B=32 L=4096", "8B B=64 L=1024", "1B B=16 L=1024"):
        found = {system: v for (c, system, metric), v in values.items() if (c, metric) == (case, "decode_step")}
        limit, own = found["limit"], found["vattn"]
        peers = {
            "torch.compile": found["torch-compile"],
            "compiled transformers, static cache": found["transformers-static-compile"],
            "eager transformers": found["transformers-dynamic"],
        }
        shape, batch, length = (word.partition("=")[2] or word for word in case.split())
        rows.append(
            [
                f"decode step, {shape}, batch {batch}, {int(length):,} tokens",
                f"{own:.2f} ms ({limit / own:.0%} of the limit, {limit:.2f})",
                "; ".join(f"{name} {time:.2f}" for name, time in peers.items()),
            ]
        )
    return rows


def _hf_rows() -> list[list[str]]:
    values = _measured("03_hf_memory")
    new = (
        values["new B=1 L=2048", "vattn", "decode_step"],
        values["new B=1 L=2048", "transformers-dynamic", "decode_step"],
    )
    ratios = [value for (_, _, metric), value in values.items() if metric == "step_ratio"]
    memory = [values["8B B=8 L=32768", system, "peak_memory"] for system in ("vattn", "transformers-dynamic")]
    static = [values["8B B=8 L=2048 max=32768", system, "peak_memory"] for system in ("vattn", "transformers-static")]
    more = max(
        value - values[case, "transformers-dynamic", "peak_memory"]
        for (case, system, metric), value in values.items()
        if (system, metric) == ("vattn", "peak_memory") and (case, "transformers-dynamic", metric) in values
    )
    return [
        ["`generate`, 8B, eager step at a length that is new", f"{new[0]:.1f} ms", f"dynamic cache {new[1]:.1f}"],
        ["… at lengths that have occurred", f"{_span(ratios, 3)} of the dynamic cache's", "a tie at 512 tokens"],
        [
            "memory beyond the weights, 8B, 8 × 32,768 tokens",
            f"{memory[0]:,.0f} MiB",
            f"dynamic cache {memory[1]:,.0f}",
        ],
        ["… 8 × 2,048 tokens of at most 32,768", f"{static[0]:,.0f} MiB", f"static cache {static[1]:,.0f}"],
        ["… where it is worst, 512 tokens each", f"{more:.0f} MiB more than the dynamic cache", ""],
    ]


def _layout_rows() -> list[list[str]]:
    admitted, attention = _measured("05_capacity"), _measured("07_decode_attention")
    case = "driver=ledger limit=60GiB shape=8B trace=log-normal"
    own, paged, layers = (admitted[case, system, "sequences"] for system in ("vattn", "paged-16", "layer-major"))
    best = _best_paged(attention, "decode_attention")
    return [
        [
            "sequences in 60 GiB, 8B, log-normal lengths",
            f"{own:.0f}",
            f"blocks of 16 tokens {paged:.0f}, pages of one layer {layers:.0f}",
        ],
        [
            "attention of a decode step, batch 1 to 128, 1k to 64k tokens",
            "its own kernel, on its own layout",
            f"best paged kernel: {_span(best)} times as long",
        ],
    ]


def results(_records: list[Record]) -> str:
    """For the README: vattn's figure beside those of what one would take instead, the worst cases among them."""
    return markdown(["what", "vattn", "instead"], [*_step_rows(), *_hf_rows(), *_layout_rows()])


OVERVIEW_TABLES: dict[str, Callable[[list[Record]], str]] = {"overview": overview, "results": results}
