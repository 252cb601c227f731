"""Backing, sharing and stepping at the speed of a block table. See README.md.

Parts without ``--vllm`` need nothing; on a GPU they take the CUDA driver and Llama-3.1-8B's shape, elsewhere the host
driver and a tiny model. ``--host`` takes the latter on a GPU's machine too.
"""

from __future__ import annotations

import argparse
import gc
import sys
from functools import lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "06_sharing"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import prefix
from backing import pages
from common import Records
from decoding import hf_shape
from served import TINY, Vattn, ask_vllm
from stepping import cuda_beside, host_beside

from vattn import Engine
from vattn.driver.cuda import unavailable
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.ops.ops_table import Ops
from vattn.tuning.table import default_ops

HERE = Path(__file__).parent
PARTS = ("pages", "beside", "prefix")
VLLM_SECONDS = 300


@lru_cache(maxsize=1)
def model_of(name: str) -> tuple[Llama, Ops]:
    """Random weights, and the operations that a decode loop takes."""
    if name == "tiny":
        model = Llama.random(TINY, device="cpu")
    else:
        model = Llama.random(LlamaConfig.from_hf(hf_shape(name)), device="cuda", dtype=torch.bfloat16)
    ops = default_ops(model.device, model.dtype)
    FusedLlama(model, 1, ops=ops)  # merges the weights
    return model, ops


def run_prefix(records: Records, name: str, vllm: Path | None) -> None:
    if vllm is not None:
        with records.going_on("vLLM"):
            theirs = ask_vllm(HERE / "prefix_vllm.py", vllm, VLLM_SECONDS, "cold", "warm", "other-salt")
            for found, metrics in theirs.items():
                add(records, found, "vllm", metrics)
    case = prefix.CASES[name]
    kinds = {"vattn": ("cold", "warm", "other-salt"), "vattn-no-index": ("cold", "warm")}
    for system, options in {"vattn": {}, "vattn-no-index": {"prefix_caching": False}}.items():
        with records.going_on(f"prefix {system}"):
            limit = {} if name == "8B" else {"memory_limit": 1 << 28}
            with Engine(model_of(name)[0], max_batch=case.requests, **limit, **options) as engine:
                engine.warm_up()
                for found, metrics in prefix.measure(Vattn(engine), case, kinds[system]):
                    add(records, found, system, metrics)
                print(engine.stats())


def add(records: Records, case: str, system: str, metrics: dict[str, list[float]]) -> None:
    for metric, samples in metrics.items():
        records.add(case, system, metric, prefix.UNITS[metric], samples)
    records.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and steps")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="these only; the records of the others stay")
    parser.add_argument("--host", action="store_true", help="the host driver and a tiny model, though there is a GPU")
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="where vLLM is installed (pip install --target)")
    options = parser.parse_args()
    parts = options.parts or PARTS
    reason = "--host" if options.host else unavailable()
    if reason:
        print(f"without CUDA: {reason}")
    records = Records("16_memory", options.quick, parts)
    # The model comes last, so that the pages are measured on an empty device; vLLM wants one too, and runs before it.
    if "pages" in parts:
        for name in ("host" if reason else "cuda", "ledger"):
            for system in ("vattn", "vattn-python", "vattn-large-pages"):
                with records.going_on(f"pages {name} {system}"):
                    pages(records, name, system, repeats=3 if options.quick else 7 if name == "host" else 21)
                gc.collect()
    records.write()
    if "prefix" in parts:
        run_prefix(records, "tiny" if reason else "8B", None if reason else options.vllm)
    if "beside" in parts:
        with records.going_on("beside"):
            if reason:
                host_beside(records, *((50, 2) if options.quick else (400, 6)))
            else:
                cuda_beside(records, *model_of("8B"), *((100, 2) if options.quick else (300, 4)))
    records.end()


if __name__ == "__main__":
    main()
