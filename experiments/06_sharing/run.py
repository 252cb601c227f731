"""What sharing and parking save, and whether mapping beside a decode loop disturbs it. See README.md."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from beside import run_beside
from common import Records
from decoding import hf_shape
from forks import run_copies, run_forks
from mapping import run_bare, run_mapping
from scrub import run_scrub, run_share
from serving import run_serving

from vattn.driver import CudaDriver, HostDriver, LedgerDriver
from vattn.driver.cuda import unavailable
from vattn.driver.ruled import RuledDriver
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.ops.ops_table import Ops
from vattn.tuning.table import default_ops

PARTS = ("forks", "mapping", "scrub", "beside", "serving")
NEED_GPU = ("scrub", "beside")
WAYS = 16


def open_ledger() -> RuledDriver:
    return LedgerDriver(1 << 50)


def open_cuda() -> RuledDriver:
    return CudaDriver(torch.device("cuda"))


@lru_cache(maxsize=1)
def llama_8b() -> tuple[Llama, Ops]:
    """Random weights of the 8B shape, and the operations that a decode loop takes."""
    model = Llama.random(LlamaConfig.from_hf(hf_shape("8B")), device="cuda", dtype=torch.bfloat16)
    ops = default_ops(model.device, model.dtype)
    FusedLlama(model, 1, ops=ops)  # merges the weights
    return model, ops


def forks(records: Records, quick: bool, open_real: Callable[[], RuledDriver], device: torch.device) -> None:
    for prompt in (1024, 1018) if quick else (4096, 4090):
        for open_driver in (open_real, open_ledger):
            with records.going_on(f"forks of {prompt}, {open_driver.__name__}"):
                run_forks(records, open_driver, prompt, WAYS, repeats=5 if quick else 21)
        with records.going_on(f"copies of {prompt}"):
            run_copies(records, device, prompt, WAYS, repeats=3)


def mapping(records: Records, quick: bool, open_real: Callable[[], RuledDriver]) -> None:
    for open_driver in (open_real, open_ledger):
        with records.going_on(f"mapping, {open_driver.__name__}"):
            run_mapping(records, open_driver, repeats=5 if quick else 31)
    with records.going_on("mapping, the calls only"):
        run_bare(records, open_real, repeats=5 if quick else 31)


def scrub(records: Records, quick: bool) -> None:
    scrub_us = run_scrub(records, open_cuda(), repeats=5 if quick else 21)
    records.write()  # the next needs the model
    run_share(records, *llama_8b(), scrub_us)


def beside(records: Records, quick: bool) -> None:
    run_beside(records, *llama_8b(), **({"steps": 100, "rounds": 2} if quick else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, steps and requests, and a shorter prompt")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="these only, the records of the others left as they are"
    )
    options = parser.parse_args()
    parts = options.parts or PARTS
    open_real: Callable[[], RuledDriver] = open_cuda
    device = torch.device("cuda")
    if reason := unavailable():
        print(f"no CUDA driver here: {reason}")
        open_real, device = HostDriver, torch.device("cpu")
        parts = [part for part in parts if part not in NEED_GPU]
    records = Records("06_sharing", options.quick, parts)
    runs: dict[str, Callable[[], None]] = {
        "forks": lambda: forks(records, options.quick, open_real, device),
        "mapping": lambda: mapping(records, options.quick, open_real),
        "scrub": lambda: scrub(records, options.quick),
        "beside": lambda: beside(records, options.quick),
        "serving": lambda: run_serving(records, options.quick),
    }
    for part in PARTS:
        if part in parts:
            with records.going_on(part):
                runs[part]()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            records.write()
    records.end()


if __name__ == "__main__":
    main()
