"""Hugging Face models with their dynamic cache, their static cache and a VirtualCache: memory and step time.

See README.md. Needs an NVIDIA GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

sys.path.insert(0, str(Path(__file__).parents[1]))
import read_rate
from common import Records

from vattn.hf import VirtualCache

MIB = 1 << 20
# transformers 5.24 calls the argument so; before, it had the other name only.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
NEEDS = ("cuda", "pynvml", "transformers")
PREFILL_TOKENS = 4096  # of all sequences together, a pass; what a pass computes is beside the point
WATCHED_STEPS, TIMED_STEPS = 4, 12
STEPS_IN_TURN = 40
RATIO_PASSES = 4
PARTS = {"new": "new", "tables": "8B", "ratios": "ratio"}  # with the first words of their cases; the new comes first
TOKENS_IN_TURN = 65536  # of a batch: three caches of so many fit beside the weights
SYSTEMS = {
    "transformers-dynamic": lambda model, batch, length: DynamicCache(config=model.config),
    "transformers-static": lambda model, batch, length: StaticCache(config=model.config, max_cache_len=length),
    "vattn": lambda model, batch, length: VirtualCache(model.config, max_length=length),
}


def make_model() -> LlamaForCausalLM:
    """Llama-3.1-8B's shape, random bfloat16 weights, laid out in device memory as ``from_pretrained`` lays them out.

    That asks for one block for all weights first. Blocks of their own would leave gaps, memory that counts as the
    weights', into which a dynamic cache's small tensors happen to fit.
    """
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            weights = sum(p.numel() * p.element_size() for p in LlamaForCausalLM(config).parameters())
        torch.empty(weights, dtype=torch.uint8, device="cuda")  # dropped at once, and kept by torch's allocator
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


class PeakMemory:
    """The most memory that NVML sees taken on the device, beyond what was taken at the start; bytes.

    A thread looks every few milliseconds, which slows Python down: steps are timed while nobody looks.
    """

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self.handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        self.start = self.bytes = 0

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)

    def begin(self) -> None:
        torch.cuda.synchronize()
        self.start, self.bytes = self._used(), 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.005):
                self.bytes = max(self.bytes, self._used() - self.start)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.bytes = max(self.bytes, self._used() - self.start)


class Run:
    """Random sequences of one batch on their way through the model, with a cache of their own."""

    def __init__(self, model: LlamaForCausalLM, cache: Any, batch: int, length: int) -> None:
        draw = torch.Generator("cuda").manual_seed(length + batch)
        self.model, self.cache, self.batch = model, cache, batch
        self.tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=draw, device="cuda")
        self.mask = torch.ones(batch, length, dtype=torch.long, device="cuda")
        self.end = 0

    @torch.no_grad()
    def prefill(self, end: int) -> None:
        """In chunks."""
        for start in range(0, end, PREFILL_TOKENS // self.batch):
            self.end = min(start + PREFILL_TOKENS // self.batch, end)
            tokens, mask = self.tokens[:, start : self.end], self.mask[:, : self.end]
            self.model(tokens, attention_mask=mask, **{CACHE: self.cache}, logits_to_keep=1)

    @torch.no_grad()
    def step(self) -> float:
        """Milliseconds of one decode step, to its token on the host."""
        self.end += 1
        tokens, mask = self.tokens[:, self.end - 1 : self.end], self.mask[:, : self.end]
        start = time.perf_counter()
        logits = self.model(tokens, attention_mask=mask, **{CACHE: self.cache}).logits
        logits.argmax(-1).tolist()  # generate looks at each token too
        return (time.perf_counter() - start) * 1e3


def give_back() -> None:
    """What nobody holds any more, to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def measure(
    model: LlamaForCausalLM, peak: PeakMemory, batch: int, length: int, system: str, maximum: int
) -> tuple[float, list[float]] | None:
    """(peak MiB, ms of each step) of one system by itself; None where it runs out of memory."""
    torch.cuda.reset_peak_memory_stats()
    peak.begin()
    cache, samples = SYSTEMS[system](model, batch, maximum), []
    run = Run(model, cache, batch, length)
    try:
        with peak.watch():
            run.prefill(length - WATCHED_STEPS - TIMED_STEPS)
            for _ in range(WATCHED_STEPS):
                run.step()
        samples = [run.step() for _ in range(TIMED_STEPS)]
        peak.bytes = max(peak.bytes, peak._used() - peak.start)
    except torch.OutOfMemoryError as error:
        print(f"{system}: {error}", flush=True)
    by_torch = torch.cuda.max_memory_reserved()
    mapped = 0
    if isinstance(cache, VirtualCache):
        mapped = cache.stats().peak_physical_bytes
        cache.close()
    del run, cache
    give_back()
    print(f"{system}: torch reserved {by_torch / MIB:.0f} MiB, weights included; mapped {mapped / MIB:.0f} MiB")
    return (peak.bytes / MIB, samples) if samples else None


def step_in_turn(
    model: LlamaForCausalLM, batch: int, length: int, systems: tuple[str, ...], maximum: int
) -> dict[str, list[float]]:
    """Milliseconds of each step, the systems taking turns: a host's speed comes and goes, for all of them alike."""
    running = {system: Run(model, SYSTEMS[system](model, batch, maximum), batch, length) for system in systems}
    samples: dict[str, list[float]] = {system: [] for system in systems}
    for run in running.values():
        run.prefill(length - WATCHED_STEPS - STEPS_IN_TURN)
    for index in range(WATCHED_STEPS + STEPS_IN_TURN):
        order = systems[index % len(systems) :] + systems[: index % len(systems)]
        for system in order:
            took = running[system].step()
            if index >= WATCHED_STEPS:
                samples[system].append(took)
    for run in running.values():
        if isinstance(run.cache, VirtualCache):
            run.cache.close()
    del run, running
    give_back()
    return samples


def ratios(
    records: Records, model: LlamaForCausalLM, batch: int, length: int, maximum: int, allocator: str = ""
) -> None:
    """A step's time over the dynamic cache's step of the same number of tokens, one right after the other, where no
    number of tokens is new: the same steps again and again, the caches cropped in between."""
    systems = ("transformers-dynamic", "vattn")
    running = {system: Run(model, SYSTEMS[system](model, batch, maximum), batch, length) for system in systems}
    samples: dict[str, list[float]] = {system: [] for system in systems}
    for run in running.values():
        run.prefill(length - STEPS_IN_TURN)
    for repetition in range(1 + RATIO_PASSES):
        for index in range(STEPS_IN_TURN):
            for system in systems if (index + repetition) % 2 else systems[::-1]:
                took = running[system].step()
                if repetition:
                    samples[system].append(took)
        for run in running.values():
            run.cache.crop(-STEPS_IN_TURN)
            run.end -= STEPS_IN_TURN
    running["vattn"].cache.close()
    running.clear()
    give_back()
    case = case_name("ratio", batch, length, maximum, allocator)
    for system, found in samples.items():
        records.add(case, system, "decode_step_again", "ms", found)
    dynamic, vattn = samples.values()
    records.add(case, "vattn", "step_ratio", "×", [ours / theirs for ours, theirs in zip(vattn, dynamic, strict=True)])


def new_steps(records: Records, model: LlamaForCausalLM, batch: int, length: int) -> None:
    """Steps that each have a number of tokens that has not occurred in the process: torch 2.11 takes cuDNN's attention
    for the transformers caches, which prepares a plan for every one."""
    case = f"new B={batch} L={length}"
    for system, found in step_in_turn(model, batch, length, tuple(SYSTEMS), length).items():
        records.add(case, system, "decode_step", "ms", found)


def compare(
    records: Records,
    model: LlamaForCausalLM,
    peak: PeakMemory,
    batch: int,
    length: int,
    systems: tuple[str, ...],
    maximum: int,
    allocator: str = "",
) -> None:
    """A row of the memory table, and of the steps' where the caches are too large to be timed in turn."""
    case = case_name("8B", batch, length, maximum, allocator)
    for system in systems:
        found = measure(model, peak, batch, length, system, maximum)
        if found is not None:
            records.add(case, system, "peak_memory", "MiB", [found[0]])
            if batch * maximum > TOKENS_IN_TURN:
                records.add(case, system, "decode_step", "ms", found[1])


def case_name(kind: str, batch: int, length: int, maximum: int, allocator: str = "") -> str:
    name = f"{kind} B={batch} L={length}" + (f" max={maximum}" if maximum != length else "")
    return name + (f" allocator={allocator}" if allocator else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="512 and 2,048 tokens only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what of it; the rest stays")
    options = parser.parse_args()
    parts = [PARTS[part] for part in options.parts]
    records, peak, model = Records("03_hf_memory", options.quick, parts), PeakMemory(), make_model()
    lengths = (512, 2048) if options.quick else (512, 2048, 8192, 32768)
    in_turn = [(batch, length) for length in lengths for batch in (1, 8) if batch * length <= TOKENS_IN_TURN]
    if "new" in options.parts:
        warm_up(model, peak)
        for batch, length in in_turn:
            new_steps(records, model, batch, length)
    if "tables" in options.parts:
        warm_up(model, peak)
        tables(records, peak, model, lengths)
    if "ratios" in options.parts:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        for batch, length in in_turn:
            ratios(records, model, batch, length, length)
        ratios(records, model, 8, 2048, 32768)
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        for batch, length in in_turn[:4]:
            ratios(records, model, batch, length, length, "expandable")
    records.write()


def warm_up(model: LlamaForCausalLM, peak: PeakMemory) -> None:
    """Load kernels and make workspaces, with numbers of tokens that no row has."""
    for system in SYSTEMS:
        for batch, length in ((1, 4200), (8, 600)):
            measure(model, peak, batch, length, system, length)


def tables(records: Records, peak: PeakMemory, model: LlamaForCausalLM, lengths: tuple[int, ...]) -> None:
    """Memory and steps of every system."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    for length in lengths:
        for batch in (1, 8):
            case = f"8B B={batch} L={length}"
            kv = batch * length * 131072
            records.add(case, "limit", "peak_memory", "MiB", [kv / MIB])
            read_rate.add_limit(records, case, "decode_step", weights + kv)
            compare(records, model, peak, batch, length, tuple(SYSTEMS), length)
    compare(records, model, peak, 8, 2048, ("transformers-static", "vattn"), 32768)
    # As PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True would have it from the start.
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    for length in (512, 2048):
        for batch in (1, 8):
            compare(records, model, peak, batch, length, tuple(SYSTEMS), length, "expandable")


if __name__ == "__main__":
    main()
