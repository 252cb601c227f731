"""Decode steps of Llama shapes: vattn's loop, its ablations, and what a user would run instead.

See README.md. Needs an NVIDIA GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.polynomial import Polynomial

sys.path.insert(0, str(Path(__file__).parents[1]))
import peers
import read_rate
from common import Records, percentiles
from decoding import SHAPES, STEPS, WARM_UP, Setting, decoding, hf_shape, step_ms
from unfused import sample_in_torch, updating_twice

from vattn import KVCache
from vattn.attention import get
from vattn.decode import DecodeLoop, Start
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.ops.ops_table import LinearTable, Ops, fused_ops, reference_ops
from vattn.ops.swiglu import swiglu_reference
from vattn.tuning.table import default_decode, default_ops, table_for

NEEDS = ("cuda", "transformers")
ABLATED = {("8B", 1, 1024), ("8B", 64, 1024)}  # of the others, only the attention is exchanged
CASES = {"8B": [(1, 1024), (8, 1024), (32, 4096), (64, 1024)], "1B": [(1, 1024), (16, 1024)]}
ATTENTIONS = {f"vattn-{name}": name for name in ("flash-attn-3", "flash-attn-2", "torch-varlen", "triton-decode")}


def _linear_then_swiglu(ops: Ops) -> Callable[..., torch.Tensor]:
    def linear_swiglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return swiglu_reference(ops.linear(x, weight, bias), x.dtype)

    return linear_swiglu


def ablations(ops: Ops) -> dict[str, Setting]:
    """Everything on; then one thing at a time off, or another."""
    eager = reference_ops()
    full = Setting(ops)
    no_pdl = LinearTable(table_for(torch.device("cuda")).linear_table(torch.bfloat16).entries)
    return {
        "vattn": full,
        "vattn-no-graph": replace(full, graphs="never"),
        "vattn-cublas-only": replace(full, ops=fused_ops(LinearTable({}, pdl=True))),
        "vattn-no-pdl": replace(full, ops=fused_ops(no_pdl), pdl=False),
        "vattn-eager-norm": replace(full, ops=replace(ops, add_rms_norm=eager.add_rms_norm)),
        "vattn-eager-rope": replace(full, ops=replace(ops, rope_append=eager.rope_append, rope_in_attention=False)),
        "vattn-eager-swiglu": replace(full, ops=replace(ops, linear_swiglu=_linear_then_swiglu(ops))),
        "vattn-eager-begin": replace(full, ops=replace(ops, begin_step=eager.begin_step)),
        "vattn-eager-sampling": replace(full, ops=replace(ops, sample_tokens=sample_in_torch)),
        "vattn-eager-update": replace(full, ops=replace(ops, advance=updating_twice(ops.advance))),
        "vattn-eager-ops": replace(full, ops=replace(eager, advance=ops.advance, sample_tokens=ops.sample_tokens)),
        "vattn-inline-mapping": replace(full, mapping="inline"),
        **{system: replace(full, attention=get(name)) for system, name in ATTENTIONS.items()},
    }


def run_cases(records: Records, name: str, model: Llama, ops: Ops) -> None:
    kv_bytes = model.kv_layout(1024).bytes_per_token
    for batch, length in CASES[name]:
        case = f"{name} B={batch} L={length}"
        read_rate.add_limit(records, case, "decode_step", model.streamed_weight_bytes() + batch * length * kv_bytes)
        for system, setting in ablations(ops).items():
            if (name, batch, length) not in ABLATED and system not in ("vattn", *ATTENTIONS):
                continue
            try:
                with decoding(model, batch, length, setting) as loop:
                    records.add(case, system, "decode_step", "ms", step_ms(loop))
                    if system == "vattn":
                        (report,) = loop.graphs
                        records.add(case, system, "graph_device_memory", "MiB", [report.device_bytes / (1 << 20)])
                        records.add(case, system, "graph_capture", "ms", [report.capture_ms])
            except (RuntimeError, ValueError) as error:  # a backend that this machine lacks
                print(f"{case} {system}: {error}")
            gc.collect()


def run_mapping(records: Records, model: Llama, ops: Ops, steps: int = 600) -> None:
    """Pages mapped as sequences cross into them, about four of 64 a step, against all of them mapped beforehand."""
    batch, length = 64, 1024
    systems = {
        "vattn": Setting(ops),
        "vattn-inline-mapping": Setting(ops, mapping="inline"),
        "vattn-premapped": Setting(ops, ahead_tokens=10**6),
    }
    times: dict[str, list[float]] = {}
    for repeat in range(2):
        for system, setting in systems.items():
            layout = model.kv_layout(length + steps + 100)
            fused = FusedLlama(model, layout.max_seq_len, ops=setting.ops)
            attention = default_decode(layout, model.device, batch, length, model.config.num_heads)
            with KVCache(
                layout,
                batch + 1,
                model.device,
                over_read_tokens=attention.over_read_tokens,
                over_read_masked=attention.masks_over_read,
            ) as cache:
                slots = [cache.acquire() for _ in range(batch)]
                cache.ensure_batch(slots, [length - 64 + i for i in range(batch)])
                with DecodeLoop(
                    fused,
                    cache,
                    attention=attention,
                    buckets=[batch],
                    mapping=setting.mapping,
                    ahead_tokens=setting.ahead_tokens,
                ) as loop:
                    loop.start_batch([Start(slot, 5, steps + WARM_UP + 1) for slot in slots])
                    samples = step_ms(loop, steps)
                    crossings = cache.stats().num_map
            if repeat:
                times[system] = samples
                print(f"{system:48s} {crossings} mappings in all, {percentiles(samples)}")
    # Steps get longer as sequences grow. What is left of that in the highest percentiles would hide everything else.
    growth = Polynomial.fit(range(steps - 1), times["vattn-premapped"], 1)
    growing = growth(np.arange(steps - 1))
    case = f"8B B={batch} L={length} staggered"
    for system, samples in times.items():
        level = np.array(samples) - growing + growing.mean()
        records.add(case, system, "decode_step", "ms", samples)
        records.add(case, system, "decode_step_p99", "ms", [float(np.quantile(level, 0.99))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=SHAPES, default=list(SHAPES), help="which models; the rest stays")
    parser.add_argument("--peers-seconds", type=float, default=1e9, help="start no further peer after so long")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the 1B shape, and no peers")
    options = parser.parse_args()
    names = ["1B"] if options.quick else options.parts
    records, begin = Records("04_decode", options.quick, names), time.perf_counter()
    for name in names:
        model = Llama.random(LlamaConfig.from_hf(hf_shape(name)), device="cuda", dtype=torch.bfloat16)
        ops = default_ops(model.device, model.dtype)
        FusedLlama(model, 1, ops=ops)  # merges the weights
        run_cases(records, name, model, ops)
        if name == "8B":
            run_mapping(records, model, ops)
        records.write()
        if not (options.no_peers or options.quick):
            run_peers(records, name, model, begin + options.peers_seconds)
    records.end()


def run_peers(records: Records, name: str, model: Llama, until: float) -> None:
    peer_runs: list[tuple[str, str, Callable[[], list[float]]]] = []
    for batch, length in CASES[name]:
        peer_runs += [
            (f"{name} B={batch} L={length}", system, make)
            for system, make in peers.runs(model, hf_shape(name), batch, length, STEPS, WARM_UP).items()
        ]
    peer_runs.sort(key=lambda run: run[1] != "transformers-dynamic")  # the quick ones first
    for case, system, make in peer_runs:
        if time.perf_counter() > until:
            print(f"{case} {system}: no time left")
            continue
        with records.going_on(f"{case} {system}"):
            records.add(case, system, "decode_step", "ms", make())
        records.write()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
