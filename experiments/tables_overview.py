"""One line an experiment: the question, what came out, and on what; made of the records of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import markdown
from tables_common import Record, best_paged, by_case, ratios, records_of, span

FOLDER = Path(__file__).parent


def _allocator(records: list[Record]) -> str:
    case = "driver=ledger slots=1024 layers=32 crossing="
    page = by_case(records, "per_page")[f"{case}all"]["vattn"]
    step = by_case(records, "ensure_batch")[f"{case}none"]["vattn"]
    return f"Python: {page:.1f} µs a page in large batches, {step:.0f} µs a step of 1,024 slots that maps none"


def _hf_memory(records: list[Record]) -> str:
    new = ratios(by_case(records, "decode_step"), "transformers-dynamic", "vattn")
    memory = ratios(by_case(records, "peak_memory"), "vattn", "transformers-dynamic")
    return (
        f"{span(memory)} of the dynamic cache's memory beyond the weights; eager steps {span(new, 1)} times faster "
        f"at a new length, {span(_of_vattn(records, 'step_ratio'))} of its time at known ones"
    )


def _of_vattn(records: list[Record], metric: str) -> list[float]:
    return [values["vattn"] for values in by_case(records, metric).values()]


def _decode(records: list[Record]) -> str:
    found = by_case(records, "decode_step")
    shares = ratios(found, "limit", "vattn")
    compiled = span(ratios(found, "torch-compile", "vattn"))
    return f"{min(shares):.0%} to {max(shares):.0%} of the limit; torch.compile takes {compiled} times as long"


def _capacity(records: list[Record]) -> str:
    paged, layers = (_of_vattn(records, f"over_{other}") for other in ("paged-16", "layer-major"))
    return f"{span(paged, 3)} of what blocks of 16 tokens hold, {span(layers)} of what pages of one layer do"


def _sharing(records: list[Record]) -> str:
    calls = by_case(records, "calls_mean")["serving lengths=bounded limit=4"]["vattn"]
    return f"{calls:.3f} driver calls a request of bounded length where every slot can keep what it has"


def _decode_attention(records: list[Record]) -> str:
    return f"best paged kernel / vattn: {span(best_paged(by_case(records, 'decode_attention')))}"


def _prefill_attention(records: list[Record]) -> str:
    paged = ratios(by_case(records, "prefill_attention"), "flash-attn-3-paged-16", "vattn")
    return f"FlashAttention-3 on blocks of 16 / on vattn's layout: {span(paged)}"


def _page_size(records: list[Record]) -> str:
    waste = [each["vattn"] for case, each in by_case(records, "waste").items() if case.endswith("page=2048KiB")]
    return f"pages of 2 MiB waste {min(waste):.1%} to {max(waste):.1%}"


def _layouts(records: list[Record]) -> str:
    return f"best paged step / vattn's: {span(best_paged(by_case(records, 'decode_step')), 3)}"


def _prefill(records: list[Record]) -> str:
    return f"blocks of 16 / vattn, mapping included: {span(ratios(by_case(records, 'prefill'), 'paged-16', 'vattn'))}"


HEADLINES: dict[str, Callable[[list[Record]], str]] = {
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


def _headline(experiment: str, records: list[Record]) -> str:
    """A dash where it is not known what the experiment's records say, or they have not all that it takes."""
    try:
        return HEADLINES[experiment](records)
    except (KeyError, ValueError):
        return "–"


def overview(_records: list[Record]) -> str:
    """Experiment, question, what came out, machine, runs and their newest date."""
    rows = []
    for readme in sorted(FOLDER.glob("*/README.md")):
        folder, question = readme.parent, readme.read_text().partition("\n")[0].removeprefix("# ")
        link, records, again = f"[{folder.name}]({folder.name})", records_of(folder), records_of(folder, "again.jsonl")
        if not records:
            own_run = (folder / "run.py").exists()
            rows.append([link, question, "not measured yet" if own_run else "made of the others' records", "–", "–"])
            continue
        machines = dict.fromkeys("CPU" if r["gpu"] == "none" else r["gpu"].split(" 80GB")[0] for r in records)
        runs = f"{2 if again else 1}, {max(record['date'] for record in (*records, *again))}"
        rows.append([link, question, _headline(folder.name, records), ", ".join(machines), runs])
    return markdown(["experiment", "question", "what came out", "machine", "runs, newest"], rows)


def _step_rows() -> list[list[str]]:
    steps = by_case(records_of(FOLDER / "04_decode"), "decode_step")
    peers = {
        "torch.compile": "torch-compile",
        "compiled transformers, static cache": "transformers-static-compile",
        "eager transformers": "transformers-dynamic",
    }
    rows = []
    for case, found in steps.items():
        if "limit" not in found:
            continue
        limit, own = found["limit"], found["vattn"]
        shape, batch, length = (word.partition("=")[2] or word for word in case.split())
        rows.append(
            [
                f"decode step, {shape}, batch {batch}, {int(length):,} tokens",
                f"{own:.2f} ms ({limit / own:.0%} of the limit, {limit:.2f})",
                "; ".join(f"{name} {found[system]:.2f}" for name, system in peers.items() if system in found),
            ]
        )
    return rows


def _hf_rows() -> list[list[str]]:
    records = records_of(FOLDER / "03_hf_memory")
    new = by_case(records, "decode_step")["new B=1 L=2048"]
    known = _of_vattn(records, "step_ratio")
    memory = by_case(records, "peak_memory")
    large, early = memory["8B B=8 L=32768"], memory["8B B=8 L=2048 max=32768"]
    more = {
        case: found["vattn"] - found["transformers-dynamic"]
        for case, found in memory.items()
        if "transformers-dynamic" in found
    }
    worst = max(more, key=more.__getitem__)
    return [
        [
            "`generate`, 8B, eager step at a length that is new",
            f"{new['vattn']:.1f} ms",
            f"dynamic cache {new['transformers-dynamic']:.1f}",
        ],
        ["… at lengths that have occurred", f"{span(known, 3)} of the dynamic cache's time", ""],
        [
            "memory beyond the weights, 8B, 8 × 32,768 tokens",
            f"{large['vattn']:,.0f} MiB",
            f"dynamic cache {large['transformers-dynamic']:,.0f}",
        ],
        [
            "… 8 × 2,048 tokens of at most 32,768",
            f"{early['vattn']:,.0f} MiB",
            f"static cache {early['transformers-static']:,.0f}",
        ],
        [
            f"… where it is worst ({worst.removeprefix('8B ')})",
            f"{memory[worst]['vattn']:,.0f} MiB",
            f"dynamic cache {memory[worst]['transformers-dynamic']:,.0f}",
        ],
    ]


def _layout_rows() -> list[list[str]]:
    admitted = by_case(records_of(FOLDER / "05_capacity"), "sequences")
    fits = admitted["driver=ledger limit=60GiB shape=8B trace=log-normal"]
    best = best_paged(by_case(records_of(FOLDER / "07_decode_attention"), "decode_attention"))
    prefill = by_case(records_of(FOLDER / "11_prefill"), "prefill")
    kernels = by_case(records_of(FOLDER / "08_prefill_attention"), "prefill_attention")
    small, large = (ratios(kernels, f"flash-attn-3-paged-{tokens}", "vattn") for tokens in (16, 256))
    return [
        [
            "sequences in 60 GiB, 8B, log-normal lengths",
            f"{fits['vattn']:.0f}",
            f"blocks of 16 tokens {fits['paged-16']:.0f}, pages of one layer {fits['layer-major']:.0f}",
        ],
        [
            "attention of a decode step, batch 1 to 128, 1k to 64k tokens",
            "its own kernel, on its own layout",
            f"best paged kernel: {span(best)} times as long",
        ],
        [
            "a whole decode step, 8B, batch 1 to 64, 1k to 64k tokens",
            "the same loop, on its own layout",
            f"best of the blocks: {span(best_paged(by_case(records_of(FOLDER / '10_layouts'), 'decode_step')), 3)} "
            "times as long",
        ],
        [
            "attention of a prompt, or of a chunk of one, 2k to 192k tokens",
            "FlashAttention-3, on its layout",
            f"blocks of 16 tokens: {span(small)} times as long, of 256: {span(large)}",
        ],
        *(
            [
                f"a whole prefill, 8B, {total:,} tokens, mapping included",
                f"{found['vattn']:,.0f} ms",
                f"blocks of 16 tokens {found['paged-16']:,.0f}, of 256 {found['paged-256']:,.0f}",
            ]
            for total in (8192, 65536)
            for found in [prefill[f"8B total={total} chunk=8192"]]
        ),
    ]


def results(_records: list[Record]) -> str:
    """For the README: vattn's figure beside those of what one would take instead, the worst cases among them."""
    return markdown(["what", "vattn", "instead"], [*_step_rows(), *_hf_rows(), *_layout_rows()])


OVERVIEW_TABLES: dict[str, Callable[[list[Record]], str]] = {"overview": overview, "results": results}
