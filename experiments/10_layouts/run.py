"""A decode step end to end on either layout, by the same model, operations and loop; and what the host does for it.

See README.md. Needs an NVIDIA GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import read_rate
from common import Records
from decoding import STEPS, WARM_UP, Setting, decoding, hf_shape, step_ms
from paged import PagedKVCache, paged_ops
from paged_attention import PagedFlashAttention2, PagedFlashAttention3

from vattn import KVCache, KVLayout
from vattn.attention import AttentionBackend, get
from vattn.decode import DecodeLoop, Start
from vattn.decode.map_ahead import MapAhead
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.ops.ops_table import Ops
from vattn.tuning.table import default_ops

NEEDS = ("cuda",)
CASES = [
    (1, 1024),
    (1, 16384),
    (1, 65536),
    (8, 1024),
    (8, 4096),
    (8, 16384),
    (32, 1024),
    (32, 4096),
    (64, 1024),
    (64, 4096),
]
PAGED = {
    "paged-16": (PagedFlashAttention3, 16),
    "paged-64": (PagedFlashAttention3, 64),
    "paged-128": (PagedFlashAttention3, 128),
    "paged-256": (PagedFlashAttention3, 256),
    "paged-256-flash-attn-2": (PagedFlashAttention2, 256),
}
HOST_BATCHES = (8, 64, 256)
HOST_STEPS, HOST_START = 512, 256


@contextmanager
def paged_decoding(
    model: Llama, batch: int, length: int, ops: Ops, kind: type[PagedFlashAttention3], block_tokens: int
) -> Iterator[DecodeLoop]:
    """As ``decoding``, over blocks that lie in any order."""
    start = length - (STEPS + WARM_UP) // 2
    layout = model.kv_layout(length + STEPS + WARM_UP + 64)
    num_blocks = 2 + batch * (2 + -(-(start + STEPS + WARM_UP + 2 * block_tokens) // block_tokens))
    with PagedKVCache(layout, batch + 1, model.device, num_blocks=num_blocks, block_tokens=block_tokens) as cache:
        for layer in layout.layers:
            cache.k(layer).normal_()
            cache.v(layer).normal_()
        random.Random(0).shuffle(cache._free)
        slots = [cache.acquire() for _ in range(batch)]
        cache.ensure_batch(slots, [start] * batch)
        own, steps = paged_ops(ops, cache)
        attention = kind(cache, steps)
        if reason := attention.supports(model.device, layout.dtype, layout.groups[0].head_dim):
            raise ValueError(reason)
        fused = FusedLlama(model, layout.max_seq_len, ops=own)
        torch.cuda.synchronize()
        with DecodeLoop(fused, cache, attention=attention, buckets=[batch]) as loop:
            loop.start_batch([Start(slot, 5 + slot, STEPS + WARM_UP + 1) for slot in slots])
            yield loop


def run_steps(records: Records, cases: list[tuple[int, int]]) -> None:
    model = Llama.random(LlamaConfig.from_hf(hf_shape("8B")), device="cuda", dtype=torch.bfloat16)
    ops = default_ops(model.device, model.dtype)
    FusedLlama(model, 1, ops=ops)  # merges the weights
    for batch, length in cases:
        case = f"8B B={batch} L={length}"
        kv_bytes = batch * length * model.kv_layout(1024).bytes_per_token
        read_rate.add_limit(records, case, "decode_step", model.streamed_weight_bytes() + kv_bytes)

        def ours(attention: AttentionBackend | None = None) -> list[float]:
            with decoding(model, batch, length, Setting(ops, attention)) as loop:  # noqa: B023
                return step_ms(loop)

        samples = ours()  # once before the others and once after them
        for name in ("flash-attn-3", "flash-attn-2"):  # the very kernels that the blocks are read with
            with records.going_on(f"{case} vattn-{name}"):
                records.add(case, f"vattn-{name}", "decode_step", "ms", ours(get(name)))
        for system, (kind, block_tokens) in PAGED.items():
            with (
                records.going_on(f"{case} {system}"),
                paged_decoding(model, batch, length, ops, kind, block_tokens) as loop,
            ):
                records.add(case, system, "decode_step", "ms", step_ms(loop))
            gc.collect()
            torch.cuda.empty_cache()
        records.add(case, "vattn", "decode_step", "ms", samples + ours())
        records.write()


def run_host(records: Records) -> None:
    """Microseconds of the host for a step's pages or blocks, with nothing else to do: sequences of all phases."""
    layout = KVLayout(32, 8, 128, HOST_START + HOST_STEPS + 80, torch.bfloat16)
    for batch in HOST_BATCHES:
        starts = HOST_START + np.arange(batch) % 16

        def over_slots(threaded: bool, batch: int = batch, starts: np.ndarray = starts) -> list[float]:
            with KVCache(layout, batch, "cuda") as cache, MapAhead(cache, 32, threaded=threaded) as mapper:
                slots = np.array([cache.acquire() for _ in range(batch)])
                cache.ensure_batch(slots, starts)
                for slot, rows in zip(slots.tolist(), starts.tolist(), strict=True):
                    mapper.track(slot, rows, layout.max_seq_len)

                def step(rows: np.ndarray) -> None:
                    mapper.require(slots, rows)
                    with cache.step(slots):
                        pass
                    mapper.look_ahead(slots, rows)

                return host_us(step, starts)

        def over_blocks(batch: int = batch, starts: np.ndarray = starts) -> list[float]:
            blocks = batch * -(-layout.max_seq_len // 16)
            with PagedKVCache(layout, batch, "cuda", num_blocks=blocks, block_tokens=16) as cache:
                slots = np.array([cache.acquire() for _ in range(batch)])
                cache.ensure_batch(slots, starts)

                def step(rows: np.ndarray) -> None:
                    cache.ensure_batch(slots, rows)
                    with cache.step(slots):
                        pass

                return host_us(step, starts)

        case = f"8B B={batch}"
        systems: dict[str, Callable[[], list[float]]] = {
            "vattn": lambda over=over_slots: over(True),
            "vattn-inline-mapping": lambda over=over_slots: over(False),
            "paged-16": over_blocks,
        }
        for system, run in systems.items():
            samples = run()
            records.add(case, system, "host_step", "us", samples)
            records.add(case, system, "host_step_mean", "us", [sum(samples) / len(samples)])
            gc.collect()
            torch.cuda.empty_cache()
    records.write()


def host_us(step: Callable[[np.ndarray], None], starts: np.ndarray) -> list[float]:
    """Of each of ``HOST_STEPS`` steps that take 2 ms, as a GPU's would."""
    samples = []
    for done in range(1, HOST_STEPS + 1):
        rows = starts + done
        begin = time.perf_counter()
        step(rows)
        samples.append((time.perf_counter() - begin) * 1e6)
        while time.perf_counter() - begin < 2e-3:
            time.sleep(2e-4)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens only")
    options = parser.parse_args()
    records = Records("10_layouts", options.quick)
    run_host(records)
    run_steps(records, [case for case in CASES if case[1] == 1024 or not options.quick])
    records.end()


if __name__ == "__main__":
    main()
