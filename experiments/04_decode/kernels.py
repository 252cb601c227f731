"""Where the time of a decode step and of a prefill goes, kernel by kernel. See README.md; needs a GPU."""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from decoding import SHAPES, WARM_UP, Setting, decoding, random_models, step_ms
from read_rate import read_bytes_per_s

from vattn import KVCache
from vattn.attention import AttentionBatch, choose
from vattn.decode import DecodeLoop
from vattn.models import FusedLlama, Llama
from vattn.ops.ops_table import Ops

NEEDS = ("cuda",)
CASES = {"8B": ((1, 1024), (8, 1024), (32, 4096), (64, 1024)), "1B": ((1, 1024), (16, 1024))}
STEPS = 24
PROMPT, PASSES = 8192, 8
PRODUCTS = ("qkv", "o", "gate-up", "down")  # of a layer, in order
GROUPS = {  # by what a kernel's name has in it
    "attention": ("attention", "rope_decode", "combine", "flash"),
    "swiglu": ("swiglu_kernel",),
    "norms-and-rope": ("norm", "rope", "append"),
    "begin-and-sample": ("begin_step", "sample", "advance", "elementwise", "index", "gather", "Mem"),
}
Kernel = tuple[str, float, float]  # its name, and when it began and ended, in us


def traced(loop: DecodeLoop) -> Iterator[list[Kernel]]:
    """The kernels of each of some steps, by CUPTI."""
    for _ in range(WARM_UP):
        loop.step()
    loop.drain()

    def steps() -> None:
        for _ in range(STEPS):
            loop.step()
        loop.drain()

    step: list[Kernel] = []
    for kernel in kernels_of(steps):
        if "begin_step" in kernel[0]:
            if step:
                yield step
            step = []
        step.append(kernel)


def kernels_of(work: Callable[[], None]) -> list[Kernel]:
    """What the GPU ran, by CUPTI, in the order in which it began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    ranges = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(ranges, key=itemgetter(1, 2))


def parts_of(step: list[Kernel], order: Sequence[str]) -> dict[str, float]:
    """Microseconds of each part of a step. A kernel's time begins where the one before it ended, if it had begun by
    then; where it had not, what is between them is a gap.

    Args:
        order: of its products.
    """
    grouped: list[str | None] = []
    products = iter(order)
    for name, *_ in step:
        group = next((group for group, words in GROUPS.items() if any(word in name for word in words)), None)
        if group is None:  # a product, or what adds up a split one's parts
            group = grouped[-1] if "reduce" in name.lower() else next(products, None)
        grouped.append(group)
    if None in grouped or next(products, None) is not None:
        raise ValueError(f"expected {len(order)} products, found another number: {step[:20]}")
    found: dict[str, float] = defaultdict(float)
    before = step[0][1]
    for group, (_, start, end) in zip(filter(None, grouped), step, strict=True):
        found["gaps"] += max(0.0, start - before)
        found[group] += max(0.0, end - max(before, start))
        before = max(before, end)
    return found


def bytes_of(model: Llama, batch: int, length: int) -> dict[str, int]:
    """What the kernels of each part read of weights and cache in a step."""
    config, layers = model.config, model.config.num_layers
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    sizes = {
        "qkv": heads * config.hidden_size * layers,
        "o": config.num_heads * config.head_dim * config.hidden_size * layers,
        "gate-up": 2 * config.intermediate_size * config.hidden_size * layers,
        "down": config.intermediate_size * config.hidden_size * layers,
        "output": config.vocab_size * config.hidden_size,
    }
    kv = batch * length * model.kv_layout(length).bytes_per_token
    return {name: size * model.dtype.itemsize for name, size in sizes.items()} | {"attention": kv}


def add_prefill(records: Records, name: str, model: Llama, ops: Ops) -> None:
    """A prompt in one pass, over pages that are mapped."""
    layers, layout = model.config.num_layers, model.kv_layout(PROMPT)
    fused = FusedLlama(model, PROMPT, ops=ops)
    attention = choose(model.device, model.dtype, model.config.head_dim)
    tokens = torch.randint(model.config.vocab_size, (PROMPT,), device=model.device)
    case, margin = f"prefill-{name} tokens={PROMPT}", attention.over_read_tokens
    order = (*PRODUCTS * (layers - 1), "qkv")  # the last layer computes K and V alone
    with KVCache(layout, 1, model.device, over_read_tokens=margin, over_read_masked=attention.masks_over_read) as cache:
        slot = cache.acquire()
        cache.ensure(slot, PROMPT)

        def prefill() -> None:
            fused.prefill(tokens, AttentionBatch((slot,), (PROMPT,), (PROMPT,), model.device), cache, attention)

        times = []
        for index in range(2 + PASSES):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            prefill()
            after.record()
            after.synchronize()
            if index > 1:
                times.append(before.elapsed_time(after))
        records.add(case, "pass", "prefill_part", "ms", times)
        passes = [kernels_of(prefill) for _ in range(PASSES)]
        parts = [parts_of(each, order) for each in passes]
        for part in parts[0]:
            records.add(case, part, "prefill_part", "ms", [median(each[part] for each in parts) / 1e3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the 1B shape only")
    options = parser.parse_args()
    shapes = ["1B"] if options.quick else [*SHAPES]
    record_parts = [f"{part}-{name}" for part in ("kernels", "prefill") for name in shapes]
    records = Records("04_decode", options.quick, record_parts)
    for name, model, ops in random_models(shapes):
        for batch, length in CASES[name]:
            case = f"kernels-{name} B={batch} L={length}"
            with records.going_on(case):
                with decoding(model, batch, length, Setting(ops)) as loop:
                    records.add(case, "step", "part", "us", [ms * 1e3 for ms in step_ms(loop)])
                gc.collect()
                with decoding(model, batch, length, Setting(ops)) as loop:
                    steps = list(traced(loop))
                records.add(case, "traced", "part", "us", [step[-1][2] - step[0][1] for step in steps])
                order = (*PRODUCTS * model.config.num_layers, "output")
                parts = [parts_of(step, order) for step in steps]
                for part in parts[0]:
                    records.add(case, part, "part", "us", [median(each[part] for each in parts)])
                for part, size in bytes_of(model, batch, length).items():
                    records.add(case, part, "reading", "us", [size / read_bytes_per_s() * 1e6])
            gc.collect()
        with records.going_on(f"prefill-{name}"):
            add_prefill(records, name, model, ops)
        gc.collect()
    records.end()


if __name__ == "__main__":
    main()
