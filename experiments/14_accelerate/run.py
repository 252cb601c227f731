"""transformers' ``generate`` as it is, compiled, over a ``VirtualCache``, and accelerated.

See README.md. Needs an NVIDIA GPU with 80 GB; ``--quick`` tries everything on a tiny model, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import read_rate
from common import Records
from decoding import hf_shape

from vattn.hf import TransformersModel, VirtualCache, accelerate

NEEDS = ("cuda", "transformers")
CONTEXT, NEW, FEW = 1024, 128, 16
MIB = 1 << 20
SHAPES: dict[str, dict[str, Any]] = {
    "8B": hf_shape("8B"),
    "gemma3-4B": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
CASES = [("8B", 1), ("8B", 8), ("gemma3-4B", 1), ("qwen3-moe", 1)]
COMPILED = ("8B",)  # shapes that a VirtualCache, and transformers' static cache with torch.compile, are timed on
# transformers 5.24 calls the argument so; before, it had the other name only.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@dataclass
class Case:
    """A model and a batch of prompts.

    Attributes:
        prompts: ``[batch, context]``.
    """

    model: PreTrainedModel
    prompts: torch.Tensor

    def generate(self, new: int, **options: Any) -> torch.Tensor:
        """Greedy, ``new`` tokens, none of them an end."""
        mask = torch.ones_like(self.prompts)
        answer: torch.Tensor = self.model.generate(
            self.prompts, attention_mask=mask, do_sample=False, min_new_tokens=None, max_new_tokens=new, **options
        )
        return answer

    def seconds(self, new: int, **options: Any) -> float:
        """Of a call of ``generate``, to its tokens on the host."""
        begin = time.perf_counter()
        self.generate(new, **options).tolist()
        return time.perf_counter() - begin


def make_model(name: str) -> PreTrainedModel:
    """A shape with random weights, which ends no sequence by itself."""
    on_gpu = torch.cuda.is_available()
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def step_ms(case: Case, repeats: int, **options: Any) -> list[float]:
    """Milliseconds a step of ``generate``: of calls for many tokens less those for few."""
    case.seconds(NEW, **options)  # compiles, captures
    found = []
    for _ in range(repeats):
        few, many = case.seconds(FEW, **options), case.seconds(NEW, **options)
        found.append((many - few) / (NEW - FEW) * 1e3)
    return found


def over_virtual_cache(case: Case, repeats: int) -> list[float]:
    """``step_ms`` with a ``VirtualCache`` of its own for each call."""
    seconds = []
    for new in (NEW, *(FEW, NEW) * repeats):
        with VirtualCache(case.model.config, CONTEXT + NEW) as past:
            seconds.append(case.seconds(new, **{CACHE: past}))
    return [(many - few) / (NEW - FEW) * 1e3 for few, many in zip(seconds[1::2], seconds[2::2], strict=True)]


class Memory:
    """The most device memory that ``generate`` takes beside the weights, MiB: torch's and the KV cache's pages."""

    def __enter__(self) -> Memory:
        free_all()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def most(self, pages_bytes: int = 0) -> float:
        return (torch.cuda.max_memory_allocated() - self.before + pages_bytes) / MIB


def free_all() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_case(records: Records, name: str, model: PreTrainedModel, batch: int, repeats: int) -> None:
    """Every system on one batch."""
    label = f"{name} B={batch} L={CONTEXT}"
    draw = torch.Generator().manual_seed(batch)
    prompts = torch.randint(1, model.config.get_text_config().vocab_size, (batch, CONTEXT), generator=draw)
    case = Case(model, prompts.to(model.device))
    on_gpu = model.device.type == "cuda"
    with records.going_on(f"{label} hf-dynamic"), Memory() as memory:
        records.add(label, "hf-dynamic", "generate_step", "ms", step_ms(case, repeats))
        if on_gpu:
            records.add(label, "hf-dynamic", "peak_memory", "MiB", [memory.most()])
    if name in COMPILED or not on_gpu:
        with records.going_on(f"{label} vattn-virtual-cache"):
            steps = over_virtual_cache(case, repeats)
            records.add(label, "vattn-virtual-cache", "generate_step", "ms", steps)
    for system, fuse in (("vattn-capture-only", False), ("vattn", True)):
        with (
            records.going_on(f"{label} {system}"),
            Memory() as memory,
            accelerate(model, CONTEXT + NEW, max_batch=batch, fuse=fuse) as fast,
        ):
            records.add(label, system, "generate_step", "ms", step_ms(case, repeats))
            if on_gpu:
                graphs = sum(each.device_bytes for each in fast.graphs)
                assert fast.kv_cache is not None
                pages = fast.kv_cache.stats().peak_physical_bytes
                records.add(label, system, "peak_memory", "MiB", [memory.most(pages)])
                records.add(label, system, "graph_memory", "MiB", [graphs / MIB])
            hits, misses = fast.num_ahead
            print(f"{hits} steps ahead were right, {misses} were not; {fast.reasons}", flush=True)
            if fuse and fast.transformers_model is not None:
                print(fast.transformers_model.report, flush=True)
    if on_gpu:
        add_limit(records, label, model, batch)
    if on_gpu and name in COMPILED:
        with records.going_on(f"{label} hf-static-compile"):
            records.add(
                label, "hf-static-compile", "generate_step", "ms", step_ms(case, repeats, cache_implementation="static")
            )
        torch.compiler.reset()
    records.write()
    free_all()


def add_limit(records: Records, label: str, model: PreTrainedModel, batch: int) -> None:
    """Reading weights, K and V once a step."""
    with TransformersModel(model, CONTEXT + NEW, fuse=False) as hf:
        weights = hf.streamed_weights()[0]
        kv_bytes = hf.kv_layout().bytes_per_token * batch * (CONTEXT + NEW // 2)
    read_rate.add_limit(records, label, "generate_step", weights + kv_bytes)


def run_opening(records: Records, name: str) -> None:
    """The first ``generate`` of a process, to its first token; the cases before have compiled the kernels."""
    for system in ("vattn", "hf-dynamic"):
        command = [sys.executable, __file__, "--opening", name, system]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        records.add(f"{name} B=1 opening", system, "first_token", "s", [float(done.stdout.split()[-1])])


def opening(name: str, system: str) -> None:
    model = make_model(name)
    prompt = torch.randint(1, model.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    case = Case(model, prompt.to(model.device))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with accelerate(model, CONTEXT + NEW, max_batch=1) if system == "vattn" else nullcontext():
        case.generate(1).tolist()
        print(time.perf_counter() - begin)


@contextmanager
def model_of(name: str) -> Iterator[PreTrainedModel]:
    model = make_model(name)
    yield model
    del model
    free_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(SHAPES), help="the rest stays; default: all but tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, and few tokens")
    parser.add_argument("--opening", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.opening:
        opening(*options.opening)
        return
    records = Records("14_accelerate", options.quick, ["tiny"] if options.quick else options.parts)
    if options.quick:
        with model_of("tiny") as model:
            for batch in (1, 4):
                run_case(records, "tiny", model, batch, 1)
    for name in () if options.quick else options.parts or dict.fromkeys(name for name, _ in CASES):
        with records.going_on(name), model_of(name) as model:
            for batch in (batch for shape, batch in CASES if shape == name):
                run_case(records, name, model, batch, options.repeats)
        if name == "8B":
            with records.going_on(f"{name} opening"):
                run_opening(records, name)
        records.write()
    records.end()


if __name__ == "__main__":
    main()
