"""The engine as a server runs it, beside vLLM on a GPU and transformers on a CPU.

See README.md. The 8B shape needs an NVIDIA GPU with 80 GB; ``--quick`` tries everything on a tiny model, anywhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import on_cpu
import workload
from common import Records
from decoding import Setting, decoding, hf_shape
from served import TINY, Vattn, ask_vllm
from table import read

from vattn import Engine
from vattn.models import Llama, LlamaConfig
from vattn.tuning import default_ops

NEEDS = ("transformers", "gguf", "accelerate")
DENSE_FLOPS = 989e12  # bfloat16, the data sheet of an H100 SXM and of an H200
MAX_BATCH = 256
VLLM_SECONDS = 400
PARTS = ("8B", "SmolLM2")


def make_model(name: str) -> Llama:
    if name == "tiny":
        return Llama.random(TINY, device="cuda" if torch.cuda.is_available() else "cpu")
    return Llama.random(LlamaConfig.from_hf(hf_shape(name)), device="cuda", dtype=torch.bfloat16)


def run_vattn(records: Records, case: workload.Case, requests_per_s: float | None) -> None:
    model = make_model(case.name)
    add_limits(records, case, model)
    options = {
        "max_batch": MAX_BATCH if case.name == "8B" else None,
        "memory_limit": None if model.device.type == "cuda" else 1 << 28,
    }
    steps = {}
    with records.going_on(f"{case.name} vattn"), Engine(model, prefix_caching=False, **options) as engine:
        begin = time.perf_counter()
        engine.warm_up()
        if case.name == "8B":
            add(records, f"{case.name} opening", {"warm_up": [time.perf_counter() - begin]}, "vattn")
        for name, metrics in workload.measure(Vattn(engine), case, requests_per_s):
            add(records, name, metrics, "vattn")
            if "engine_step" in metrics:
                steps[name] = median(metrics["engine_step"])
        stats = engine.stats()
        print(f"{stats.num_preemptions} preemptions, {stats.num_prefill_tokens} prompt tokens computed")
    with records.going_on(f"{case.name} vattn-index"), Engine(model, **options) as engine:
        engine.warm_up()
        by_size = {(batch, context): steps[f"{case.name} B={batch} L={context}"] for batch, context in case.steps}
        for name, metrics in workload.prefill(Vattn(engine), case, by_size):
            add(records, name, metrics, "vattn-index")
    if model.device.type == "cuda":
        with records.going_on(f"{case.name} vattn-loop"):
            run_loop(records, case, model)


def run_loop(records: Records, case: workload.Case, model: Llama) -> None:
    """The decode loop that the engine runs, by itself, on the same clock."""
    ops = default_ops(model.device, model.dtype)
    for batch, context in case.steps:
        with decoding(model, batch, context, Setting(ops)) as loop:
            times = []
            while loop.step() or not times:
                times.append(time.perf_counter() * 1e3)
        samples = [later - earlier for earlier, later in pairwise(times[8:-2])]
        records.add(f"{case.name} B={batch} L={context}", "vattn-loop", "engine_step", "ms", samples)


def add_limits(records: Records, case: workload.Case, model: Llama) -> None:
    """Reading weights, K and V once a step; all products of a prompt at the data sheet's rate."""
    if case.name == "tiny":
        return
    import read_rate  # wants Triton, which a CPU may lack

    config, kv_bytes = model.config, model.kv_layout(1024).bytes_per_token
    for batch, context in case.steps:
        least = model.streamed_weight_bytes() + batch * context * kv_bytes
        read_rate.add_limit(records, f"{case.name} B={batch} L={context}", "engine_step", least)
    weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.ndim == 2)
    for count, length in case.prefill:
        attention = 2.0 * config.num_heads * config.head_dim * config.num_layers * (length + 1)
        most = DENSE_FLOPS / (2.0 * weights + attention)
        name = f"{case.name} prompts={count} tokens={length}"
        records.add(name, "limit", "prefill_tokens_per_s", "tokens/s", [most])


def add(records: Records, case: str, metrics: dict[str, list[float]], system: str) -> None:
    for metric, samples in metrics.items():
        if samples:
            records.add(case, system, metric, workload.UNITS[metric], samples)
    records.write()


def run_vllm(records: Records, site: Path) -> float:
    """vLLM's side; returns the rate at which the trace's requests arrive at it."""
    found = ask_vllm(Path(__file__).parent / "vllm_side.py", site, VLLM_SECONDS)
    for case, metrics in found.items():
        add(records, case, metrics, "vllm")
    return float(found["8B poisson=256"]["arrivals"][0])


def run_opening(records: Records) -> None:
    """From ``Engine(...)`` to its first token, in processes that find the kernels compiled."""
    command = [sys.executable, __file__, "--opening"]
    seconds = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]) for _ in range(4)
    ]
    records.add("8B opening", "vattn", "open_to_first_token", "s", seconds[1:])


def opening() -> None:
    model = make_model("8B")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with Engine(model) as engine:
        workload.run(Vattn(engine), [(workload.tokens(workload.CASES["8B"], 128, 1), 1)])
        print(time.perf_counter() - begin)


def told_rate(records: Records) -> float | None:
    """80 % of what vLLM got through in an earlier run on the same kind of GPU."""
    for record in (*records.records, *read(records.path)):
        same = record["gpu"] == records.card["gpu"]
        if same and record["system"] == "vllm" and record["metric"] == "arrivals":
            return float(record["value"])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="the rest stays; default: what this machine can run")
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="where vLLM is installed (pip install --target)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and few tokens")
    parser.add_argument("--opening", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.opening:
        opening()
        return
    parts = ["tiny", "SmolLM2"] if options.quick else options.parts
    if parts is None:
        parts = ["8B"] if torch.cuda.is_available() else ["SmolLM2"]
    records = Records("13_serving", options.quick, parts)
    if "tiny" in parts:
        run_vattn(records, workload.CASES["tiny"], None)
    if "8B" in parts:
        rate = None
        if options.vllm is not None:
            with records.going_on("vLLM"):
                rate = run_vllm(records, options.vllm)
        run_vattn(records, workload.CASES["8B"], rate or told_rate(records))
        with records.going_on("opening"):
            run_opening(records)
    if "SmolLM2" in parts:
        on_cpu.run(records, options.quick)
    records.end()


if __name__ == "__main__":
    main()
