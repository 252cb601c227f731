"""Attention of decode steps, a layer of 8B heads: contiguous on pages mapped on demand, contiguous, and paged.

See README.md. Needs an NVIDIA GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import read_rate
from common import Records, time_us
from paged import PagedKVCache, PagedStep
from paged_attention import PagedFlashAttention2, PagedFlashAttention3
from paged_flashinfer import FlashInferDecode

from vattn import KVCache, KVLayout
from vattn.attention import DecodeBatch, bind, decode_backends, get
from vattn.tuning.measure import replays_us
from vattn.tuning.table import default_decode

NEEDS = ("cuda",)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
COLD_BYTES = 400 << 20  # of K and V to go through, so that none are left in the L2 cache
NUM_LAYERS, CACHE_BYTES = 32, 40e9  # of vattn's cache: a whole model's, interleaved, or as many as this memory holds
BLOCK_TOKENS = (16, 64, 128, 256)
CASES = [(b, n) for b in (1, 8, 32, 128) for n in (1024, 4096, 16384, 65536) if b * n <= 1 << 21]
CONTIGUOUS = ("flash-attn-2", "flash-attn-3", "triton-decode")

Launch = Callable[[int], torch.Tensor]


def reference(cache: KVCache, q: torch.Tensor, slots: list[int], chosen: list[int], layer: int) -> torch.Tensor:
    """In float32, of some sequences of the batch: ``[chosen, heads, head_dim]``."""
    out = []
    for i in chosen:
        k, v = (x.float() for x in cache.rows(slots[i], layer))
        query = q[i].float().unflatten(0, (NUM_KV_HEADS, -1))
        scores = torch.einsum("hgd,thd->hgt", query, k) * HEAD_DIM**-0.5
        out.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), v).flatten(0, 1))
    return torch.stack(out)


def over_vattn(cache: KVCache, layers: list[int], q: torch.Tensor, batch: DecodeBatch) -> Iterator[tuple[str, Launch]]:
    """The backend that vattn takes by itself, then each by name."""
    views = [(cache.k(layer), cache.v(layer)) for layer in layers]
    length = batch.max_end - 64
    chosen = default_decode(cache.layout, q.device, batch.batch_size, length, NUM_HEADS)
    for system, backend in (("vattn", chosen), *((f"vattn-{name}", get(name)) for name in CONTIGUOUS)):
        if reason := backend.supports(q.device, q.dtype, HEAD_DIM):
            print(f"{system}: {reason}")
            continue
        bound = bind(backend)
        yield system, lambda index, bound=bound: bound(q, *views[index], batch, scale=HEAD_DIM**-0.5)


def over_tensors(
    cache: KVCache, layers: list[int], slots: list[int], q: torch.Tensor, length: int
) -> Iterator[tuple[str, Launch]]:
    """Copies of K and V in ordinary memory, a tensor each of every layer: what the kernels were written for."""
    pairs = [tuple(torch.stack([cache.rows(slot, layer)[i] for slot in slots]) for i in range(2)) for layer in layers]
    order = torch.arange(len(slots), dtype=torch.int32, device=q.device)
    batch = DecodeBatch(order, torch.full_like(order, length - 1), torch.full_like(order, length), length)
    for name in CONTIGUOUS[:2]:
        if get(name).supports(q.device, q.dtype, HEAD_DIM) is None:
            yield (
                f"{name}-contiguous",
                lambda index, name=name: get(name)(q, *pairs[index], batch, scale=HEAD_DIM**-0.5),
            )


def over_blocks(
    cache: KVCache, layers: list[int], slots: list[int], q: torch.Tensor, length: int, block_tokens: int
) -> Iterator[tuple[str, Launch]]:
    """The same K and V in blocks, which lie in any order."""
    size, blocks = len(slots), len(slots) * -(-length // block_tokens)
    layout = KVLayout(len(layers), NUM_KV_HEADS, HEAD_DIM, cache.layout.max_seq_len, q.dtype)
    with PagedKVCache(layout, size, q.device, num_blocks=blocks, block_tokens=block_tokens) as paged:
        random.Random(0).shuffle(paged._free)
        for slot in slots:
            target = paged.acquire()
            paged.ensure(target, length)
            for index, layer in enumerate(layers):
                paged.write(target, index, *cache.rows(slot, layer))
        with paged.step(range(size)):
            pass
        order = torch.arange(size, dtype=torch.int32, device=q.device)
        batch = DecodeBatch(order, torch.full_like(order, length - 1), torch.full_like(order, length), length)
        step = PagedStep(paged, size)
        step.look_up(order, batch.rows_int32)
        for kind in (PagedFlashAttention2, PagedFlashAttention3):
            backend = kind(paged, {size: step})
            if backend.supports(q.device, q.dtype, HEAD_DIM) is None:
                yield (
                    f"{kind.name.removeprefix('paged-')}-paged-{block_tokens}",
                    lambda layer, backend=backend: backend(
                        q, paged.k(layer), paged.v(layer), batch, scale=HEAD_DIM**-0.5
                    ),
                )
        try:
            import flashinfer  # noqa: F401
        except ImportError as error:
            print(f"flashinfer: {error}")
            return
        for system, tensor_cores in (("flashinfer", False), ("flashinfer-tensor-cores", True)):
            decode = FlashInferDecode(paged, list(range(size)), NUM_HEADS, tensor_cores)
            tables = decode.tables([length] * size)
            decode.plan(tables)
            yield f"{system}-paged-{block_tokens}", partial(decode, q)
            if block_tokens == 16:
                PLANS[f"{system}-paged-{block_tokens}"] = time_us(lambda d=decode, t=tables: d.plan(t), 20)


PLANS: dict[str, list[float]] = {}


def run_case(records: Records, size: int, length: int) -> None:
    case = f"8B B={size} L={length}"
    layer_bytes = size * length * NUM_KV_HEADS * HEAD_DIM * 4
    num_layers = max(2, min(NUM_LAYERS, int(CACHE_BYTES // layer_bytes)))
    num_timed = max(2, min(num_layers, -(-COLD_BYTES // layer_bytes)))
    layers = [i * num_layers // num_timed for i in range(num_timed)]  # of the cache: those that are read
    read_rate.add_limit(records, case, "decode_attention", layer_bytes, "us")
    layout = KVLayout(num_layers, NUM_KV_HEADS, HEAD_DIM, length + 64, torch.bfloat16)
    margin = max(backend.over_read_tokens for backend in decode_backends())
    generator = torch.Generator("cuda").manual_seed(size + length)
    with KVCache(layout, size, "cuda", over_read_tokens=margin) as cache:
        slots = [cache.acquire() for _ in range(size)]
        random.Random(1).shuffle(slots)
        cache.ensure_batch(slots, [length] * size)
        for slot in slots:
            for layer in layers:
                for rows in cache.rows(slot, layer):
                    rows.normal_(generator=generator)
        q = torch.randn(size, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
        index = torch.tensor(slots, dtype=torch.int32, device="cuda")
        batch = DecodeBatch(index, torch.full_like(index, length - 1), torch.full_like(index, length), length + 64)
        chosen = sorted({0, size // 2, size - 1})
        expected = reference(cache, q, slots, chosen, layers[-1])

        def record(system: str, launch: Launch) -> None:
            found = launch(num_timed - 1)[chosen].float()
            error = (found - expected).abs().max().item()
            assert error < 2e-2 * expected.abs().max().item() + 1e-3, f"{case} {system}: off by {error}"
            records.add(case, system, "decode_attention", "us", replays_us(launch, num_timed, 20))

        sources = [over_vattn(cache, layers, q, batch), over_tensors(cache, layers, slots, q, length)]
        sources += [over_blocks(cache, layers, slots, q, length, block_tokens) for block_tokens in BLOCK_TOKENS]
        for number, source in enumerate(sources):
            with records.going_on(f"{case} source {number}"):
                for system, launch in source:
                    with records.going_on(f"{case} {system}"):
                        record(system, launch)
            gc.collect()
            torch.cuda.empty_cache()
    for system, samples in PLANS.items():
        records.add(case, system, "plan", "us", samples)
    PLANS.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens only")
    options = parser.parse_args()
    records = Records("07_decode_attention", options.quick)
    for size, length in CASES:
        if length <= 1024 or not options.quick:
            run_case(records, size, length)
            records.write()
    records.end()


if __name__ == "__main__":
    main()
