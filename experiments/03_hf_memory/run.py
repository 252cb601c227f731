"""Hugging Face models with their dynamic cache, their static cache and a VirtualCache: memory and step time.

See README.md. Needs an NVIDIA GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records

from vattn.hf import VirtualCache

MIB = 1 << 20
NEEDS = ("cuda", "pynvml", "transformers")
READ_BYTES_PER_S = 3.03e12  # read-only, measured on an H100
PREFILL_TOKENS = 4096  # of all sequences together, a pass; what a pass computes is beside the point
WATCHED_STEPS, TIMED_STEPS = 4, 12
ROUNDS = 3
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


@torch.no_grad()
def fill_and_step(model: LlamaForCausalLM, cache: Any, batch: int, length: int, peak: PeakMemory) -> list[float]:
    """A prompt in chunks, then decode steps up to ``length`` tokens; milliseconds of each timed step."""
    draw = torch.Generator("cuda").manual_seed(length + batch)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=draw, device="cuda")
    mask = torch.ones(batch, length, dtype=torch.long, device="cuda")
    prompt = length - WATCHED_STEPS - TIMED_STEPS
    samples = []

    def step(end: int) -> None:
        start_time = time.perf_counter()
        logits = model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache).logits
        logits.argmax(-1).tolist()  # generate looks at each token too
        samples.append((time.perf_counter() - start_time) * 1e3)

    with peak.watch():
        for start in range(0, prompt, PREFILL_TOKENS // batch):
            end = min(start + PREFILL_TOKENS // batch, prompt)
            model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, logits_to_keep=1)
        for end in range(prompt + 1, prompt + WATCHED_STEPS + 1):
            step(end)
    samples.clear()
    for end in range(length - TIMED_STEPS + 1, length + 1):
        step(end)
    peak.bytes = max(peak.bytes, peak._used() - peak.start)
    return samples


def measure(
    model: LlamaForCausalLM, peak: PeakMemory, batch: int, length: int, system: str, maximum: int
) -> tuple[float, list[float]] | None:
    """(peak MiB, ms of each step) of one system; None where it runs out of memory."""
    torch.cuda.reset_peak_memory_stats()
    peak.begin()
    cache, samples = SYSTEMS[system](model, batch, maximum), []
    try:
        samples = fill_and_step(model, cache, batch, length, peak)
    except torch.OutOfMemoryError as error:
        print(f"{system}: {error}", flush=True)
    by_torch = torch.cuda.max_memory_reserved()
    if isinstance(cache, VirtualCache):
        mapped = cache.stats().peak_physical_bytes
        cache.close()
    else:
        mapped = 0
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{system}: torch reserved {by_torch / MIB:.0f} MiB, weights included; mapped {mapped / MIB:.0f} MiB")
    return (peak.bytes / MIB, samples) if samples else None


def compare(
    records: Records,
    model: LlamaForCausalLM,
    peak: PeakMemory,
    batch: int,
    length: int,
    systems: Sequence[str],
    maximum: int,
    note: str = "",
) -> None:
    """A row of the tables: short ones three times over, in turn, because a host's speed comes and goes."""
    case = f"8B B={batch} L={length}" + (f" max={maximum}" if maximum != length else "") + note
    memory: dict[str, list[float]] = {system: [] for system in systems}
    steps: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(ROUNDS if length <= 2048 else 1):
        for system in systems:
            if (found := measure(model, peak, batch, length, system, maximum)) is not None:
                memory[system].append(found[0])
                steps[system] += found[1]
    for system in systems:
        if memory[system]:
            records.add(case, system, "peak_memory", "MiB", memory[system])
            records.add(case, system, "decode_step", "ms", steps[system])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="512 and 2,048 tokens only")
    options = parser.parse_args()
    records, peak, model = Records("03_hf_memory", options.quick), PeakMemory(), make_model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    for system in SYSTEMS:
        for batch, length in ((1, 4200), (8, 512)):
            measure(model, peak, batch, length, system, length)
    for length in (512, 2048) if options.quick else (512, 2048, 8192, 32768):
        for batch in (1, 8):
            case = f"8B B={batch} L={length}"
            kv = batch * length * 131072
            records.add(case, "limit", "peak_memory", "MiB", [kv / MIB])
            records.add(case, "limit", "decode_step", "ms", [(weights + kv) / READ_BYTES_PER_S * 1e3])
            compare(records, model, peak, batch, length, tuple(SYSTEMS), length)
    compare(records, model, peak, 8, 2048, ("transformers-static", "vattn"), 32768)
    # As PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True would have it from the start.
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    for length in (512, 2048):
        for batch in (1, 8):
            compare(records, model, peak, batch, length, tuple(SYSTEMS), length, " allocator=expandable")
    records.write()


if __name__ == "__main__":
    main()
