"""vAttention's published figures beside what the records of these experiments say of the same questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import markdown
from tables_common import Found, Record, best_paged, by_case, fields, ratios, records_of, span

FOLDER = Path(__file__).parent
_MISSING = "not measured yet"


def _found(experiment: str, metric: str) -> Found:
    return by_case(records_of(FOLDER / experiment), metric)


def _all(parts: dict[str, list[float]], digits: int = 2) -> str:
    """``"name span, name span"``, or that nothing of it was measured."""
    known = {name: values for name, values in parts.items() if values}
    return ", ".join(f"{name} {span(known[name], digits)}" for name in known) or _MISSING


def _prefill_kernels() -> list[list[str]]:
    found = _found("08_prefill_attention", "prefill_attention")

    def paged(where: Callable[[str], bool]) -> str:
        pairs = {"FA2": ("flash-attn-2", 256), "FlashInfer": ("flashinfer", 16), "FA3": ("flash-attn-3", 16)}
        return _all(
            {
                f"{name} on {tokens}": ratios(found, f"{system}-paged-{tokens}", f"{system}-contiguous", where)
                for name, (system, tokens) in pairs.items()
            }
        )

    return [
        ["prefill attention: paged / contiguous", "FA2 up to 1.37, FlashInfer up to 1.42 (figure 2)", paged(_whole)],
        ["… a prompt of 192k", "FA2 1.27, of a Yi-6B (table 6)", paged(lambda case: case.endswith("total=196608"))],
    ]


def _whole(case: str) -> bool:
    words = fields(case)
    return words.get("new") == words["total"]


def _prefill() -> list[list[str]]:
    found = _found("11_prefill", "prefill")

    def longest(case: str) -> bool:
        return "total=65536" in case

    paged = {f"blocks of {n}": ratios(found, f"paged-{n}", "vattn", longest) for n in (16, 256)}
    first = {
        "mapped first": ratios(found, "vattn-sync-mapping", "vattn-parked"),
        "while computing": ratios(found, "vattn", "vattn-parked"),
    }
    return [
        ["prefill end to end: paged / contiguous", "192k: FA2 1.24 to 1.26 (figure 7)", f"64k, FA3: {_all(paged)}"],
        [
            "prefill with pages mapped / still mapped from before",
            "mapped first 1.15, with deferred reclamation 1.00 (64 KiB pages; figure 13)",
            _all(first),
        ],
    ]


def _decode() -> list[list[str]]:
    found = _found("07_decode_attention", "decode_attention")

    def at_16k(case: str) -> bool:
        return case.endswith("L=16384") and "B=128" not in case

    flash = {"FA2 on 256": ratios(found, "flash-attn-2-paged-256", "flash-attn-2-contiguous", at_16k)}
    flash["FA3 on 16"] = ratios(found, "flash-attn-3-paged-16", "flash-attn-3-contiguous", at_16k)
    infer = ratios(found, "flashinfer-tensor-cores-paged-16", "flash-attn-2-contiguous", at_16k)
    sizes = [16, 64, 128, 256]
    by_size = {
        name: [
            max(times) / min(times)
            for case, values in found.items()
            if at_16k(case) and all(f"{system}-paged-{n}" in values for n in sizes)
            for times in [[values[f"{system}-paged-{n}"] for n in sizes]]
        ]
        for name, system in (
            ("FA3", "flash-attn-3"),
            ("FlashInfer (tensor cores)", "flashinfer-tensor-cores"),
            ("FlashInfer (plain)", "flashinfer"),
        )
    }
    best = best_paged(_found("10_layouts", "decode_step"), at_16k)
    return [
        ["decode attention at 16k: paged / contiguous, batch 1 to 32", "FA2 about 1 (table 7)", _all(flash)],
        ["… FlashInfer paged / FA2 contiguous", "step: up to 1.23 (figure 8)", span(infer) if infer else _MISSING],
        [
            "… the paged kernel of the day / FA2 contiguous",
            "vLLM 0.2.7's up to 2.8 (table 7)",
            _all({"FA3 on 16": ratios(found, "flash-attn-3-paged-16", "flash-attn-2-contiguous", at_16k)}),
        ],
        ["… slowest / fastest block size, 16 to 256 tokens", "vLLM's up to 1.9 (figure 3)", _all(by_size)],
        [
            "decode step at 16k: paged / contiguous",
            "FA2 about 1; vLLM's kernel 1.53 to 1.99 at batch 32 (figure 8)",
            f"best of FA2, FA3 and all block sizes / vattn: {span(best, 3)}" if best else _MISSING,
        ],
    ]


def _pages() -> list[list[str]]:
    admitted = _found("09_page_size", "sequences")
    mapping = _found("04_decode", "decode_step_p99")
    made = _found("02_allocator", "per_page").get("driver=cuda slots=1024 layers=32 crossing=all", {})

    def sequences(system: str) -> list[float]:
        return [
            values[system] / admitted[case.replace("=64KiB", "=2048KiB")][system]
            for case, values in admitted.items()
            if case.endswith("page=64KiB") and system in values
        ]

    staggered = next((values for case, values in mapping.items() if "staggered" in case), {})
    spikes = {
        name: [staggered[system] / staggered["vattn-premapped"]] if staggered else []
        for name, system in (("in the caller's thread", "vattn-inline-mapping"), ("ahead", "vattn"))
    }
    return [
        [
            "sequences that fit: pages of 64 KiB / 2 MiB",
            "pages of one layer: 1.21 to 1.28, by a patched driver (figure 15)",
            _all(
                {
                    "pages of one layer": sequences("layer-major"),
                    "vattn's, of all layers": sequences("vattn"),
                }
            ),
        ],
        [
            "decode steps while pages are mapped",
            "5 to 15 ms longer where they wait for it; none mapped ahead (figure 12)",
            f"99th percentile / all mapped beforehand: {_all(spikes, 4)}",
        ],
        [
            "memory mapped per second, one GPU",
            "7.6 GB/s in pages of 64 KiB (table 9)",
            f"{(2 << 20) / made['vattn'] / 1e3:.0f} GB/s in pages of 2 MiB, from Python" if made else _MISSING,
        ],
    ]


def paper(_records: list[Record]) -> str:
    """A row a question: the paper's figure, and what the records of the experiments say."""
    rows = [*_prefill_kernels(), *_prefill(), *_decode(), *_pages()]
    return markdown(["question", "vAttention (A100, kernels of 2024)", "here (H100, kernels of 2025 and 2026)"], rows)


PAPER_TABLES: dict[str, Callable[[list[Record]], str]] = {"paper": paper}
