"""The overview of all experiments, and the results in the README above."""

from __future__ import annotations

import re

import table
from table import Record, machine, markdown, marked, read


def overview(_: list[Record]) -> str:
    """Experiment, question, answer, machine, runs and their newest date."""
    rows = []
    for readme in sorted(table.FOLDER.glob("*/README.md")):
        folder, text = readme.parent, re.sub("<!--.*?-->", "", readme.read_text())
        records, again = read(folder / "results.jsonl"), read(folder / "again.jsonl")
        answer = re.search(r"^\*\*Answer\.\*\* (.*?)\n\n", text, re.DOTALL | re.MULTILINE)
        found = " ".join(answer[1].split()) if answer else "–"
        if not records and (folder / "run.py").exists():
            found = "not measured yet"
        runs = f"{2 if again else 1}, {max(r['date'] for r in records + again)}" if records else "–"
        machines = ", ".join(dict.fromkeys(map(machine, records))) or "–"
        question = text.partition("\n")[0].removeprefix("# ")
        rows.append([f"[{folder.name}]({folder.name})", question, found, machines, runs])
    return markdown(["experiment", "question", "answer", "machine", "runs, newest"], rows)


def results(_: list[Record]) -> str:
    """vattn's figure beside those of what one would take instead, losses among them."""
    memory, fits = "03 peak_memory:B=8:L=32768", "05 sequences:driver=ledger:shape=8B:trace=log-normal"
    short, long = "11 prefill:total=8192", "11 prefill:total=65536"
    rows = [
        *(_step(*case) for case in (("8B", 1), ("8B", 8), ("8B", 64), ("1B", 1))),
        [
            "`generate`, 8B, 8 × 32,768 tokens: memory beyond the weights",
            f"{marked(f'{memory} vattn')} MiB",
            f"dynamic cache {marked(f'{memory} transformers-dynamic')}, "
            f"static cache {marked(f'{memory} transformers-static')}",
        ],
        [
            "sequences in 60 GiB, 8B, log-normal lengths",
            marked(f"{fits} vattn"),
            f"blocks of 16 tokens {marked(f'{fits} paged-16')}, pages of one layer {marked(f'{fits} layer-major')}",
        ],
        [
            "decode step, 8B, batch 1 to 64, 1k to 64k tokens",
            "its layout, in its loop",
            f"the best of the blocks, in the same loop: {marked('10 decode_step paged-.*/vattn .3f')} times as long",
        ],
        [
            "prefill, 8B, mapping included: 8,192 tokens, where it loses most; 65,536",
            f"{marked(f'{short} vattn .0f')} ms; {marked(f'{long} vattn ,.0f')}",
            f"blocks of 256 tokens {marked(f'{short} paged-256 .0f')}; {marked(f'{long} paged-256 ,.0f')}, "
            f"of 16 {marked(f'{short} paged-16 .0f')}; {marked(f'{long} paged-16 ,.0f')}",
        ],
    ]
    return markdown(["what", "vattn", "instead"], rows)


def _step(shape: str, batch: int) -> list[str]:
    at = f"04 decode_step:{shape}:B={batch}:L=1024"
    return [
        f"decode step, {shape}, batch {batch}, 1,024 tokens",
        f"{marked(f'{at} vattn .2f')} ms ({marked(f'{at} limit/vattn .0%')} of the limit)",
        f"torch.compile {marked(f'{at} torch-compile .2f')}, compiled transformers with its static cache "
        f"{marked(f'{at} transformers-static-compile .2f')}",
    ]
