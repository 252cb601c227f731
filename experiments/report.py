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
    return markdown(["experiment", "question", "answer", "machine", "runs, date of the newest"], rows)


def results(_: list[Record]) -> str:
    """vattn's figure beside those of what one would take instead, losses among them."""
    memory = "03 peak_memory:B=8:L=32768"
    dynamic, static = (marked(f"{memory} transformers-{name}") for name in ("dynamic", "static"))
    rows = [
        *(_step(*case) for case in (("8B", 1), ("1B", 1))),
        _engine(),
        [
            "H100: `generate`, 8B, 8 × 32,768 tokens: memory beyond the weights",
            f"{marked(f'{memory} vattn')} MiB",
            f"dynamic cache {dynamic}, static cache {static}",
        ],
        _generate(),
        _serving(),
        _server(),
        _prefill(8192, "the worst of four lengths"),
    ]
    return markdown(["what", "vattn", "instead"], rows)


def _step(shape: str, batch: int) -> list[str]:
    at = f"decode_step:{shape}.B={batch}.L=1024"
    vattn, share = marked(f"04 {at} vattn .2f"), marked(f"04 {at} limit/vattn .0%")
    compiled, static = (marked(f"04 {at} {name} .2f") for name in ("torch-compile", "transformers-static-compile"))
    blocks = marked(f"10 {at} paged-.* .2f")
    return [
        f"H100: decode step, {shape}, batch {batch}, 1,024 tokens",
        f"{vattn} ms ({share} of the limit)",
        f"torch.compile {compiled}, transformers compiled, static cache {static}"
        + (f", the same loop over blocks {blocks}" if blocks != "–" else ""),
    ]


def _engine() -> list[str]:
    """Steps of the engine, and its shares of the limit, beside vLLM's."""
    cases = [f"13 engine_step:8B.B={batch}.L=1024" for batch in (1, 8, 64)]
    vattn, vllm = (", ".join(marked(f"{case} {system} .2f") for case in cases) for system in ("vattn", "vllm"))
    shares = ", ".join(marked(f"{case} limit/vattn .0%") for case in cases)
    return [
        "H200: decode step of the engine, 8B, batch 1, 8 and 64, 1,024 tokens",
        f"{vattn} ms ({shares} of the limit)",
        f"vLLM {vllm}",
    ]


def _generate() -> list[str]:
    """A step of ``accelerate``, and what it costs at first."""

    def found(system: str) -> list[str]:
        steps = [marked(f"14 generate_step:8B:B={batch}:L=1024 {system} .1f") for batch in (1, 8)]
        return [*steps, marked(f"14 first_token {system} .1f")]

    vattn, dynamic, compiled = map(found, ("vattn", "hf-dynamic", "hf-static-compile"))
    return [
        "H200, a slow host: `generate`, 8B, batch 1 and 8: a step; a process's first token",
        f"{vattn[0]}, {vattn[1]} ms; {vattn[2]} s",
        f"as it is {dynamic[0]}, {dynamic[1]}; {dynamic[2]} s; compiled, static cache {compiled[0]}, {compiled[1]}",
    ]


def _serving() -> list[str]:
    """The trace, and what a long prompt takes beside others and makes them wait."""
    metrics = (("trace_tokens_per_s", ",.0f"), ("prompt_beside", ".0f"), ("longest_silence", ".0f"))
    vattn, vllm = ([marked(f"13 {metric} {system} {form}") for metric, form in metrics] for system in ("vattn", "vllm"))
    return [
        "H200: 256 requests, 8B, no prefix caching; a prompt of 16,384 tokens beside 8 others, their longest silence",
        f"{vattn[0]} tokens/s; {vattn[1]} ms, {vattn[2]} ms",
        f"vLLM, default passes, {vllm[0]} tokens/s; {vllm[1]} ms, {vllm[2]} ms",
    ]


def _server() -> list[str]:
    """What clients see over HTTP."""
    metrics = (("tokens_per_s", ",.0f"), ("first_token", ".0f"), ("between_tokens", ".2f"))
    vattn, vllm = ([marked(f"17 {metric} {system} {form}") for metric, form in metrics] for system in ("vattn", "vllm"))
    return [
        "H200: `vattn serve`, 8B, 64 streams: all; first token, between tokens (medians)",
        f"{vattn[0]} tokens/s; {vattn[1]}, {vattn[2]} ms",
        f"`vllm serve` {vllm[0]} tokens/s; {vllm[1]}, {vllm[2]} ms",
    ]


def _prefill(tokens: int, note: str) -> list[str]:
    vattn, small, large = (marked(f"11 prefill:total={tokens} {n} ,.0f") for n in ("vattn", "paged-16", "paged-256"))
    instead = f"blocks of 16 tokens {small}, of 256 {large}"
    return [f"H100: prefill, 8B, {tokens:,} tokens, {note}", f"{vattn} ms", instead]
