"""Attention of prefill, one sequence, a layer of 8B heads: contiguous on pages mapped on demand, contiguous, and paged.

See README.md. Needs an NVIDIA GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from mapped import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, Launch, run_mapping, timed

from vattn import KVCache, KVLayout
from vattn.attention import AttentionBatch, get

NEEDS = ("cuda",)
DENSE_FLOPS = 989e12  # bfloat16, an H100 SXM's data sheet
NUM_HEADS = 32
WHOLE = (2048, 8192, 16384, 32768, 65536, 131072, 196608)
CHUNKS = [(new, total) for total in (32768, 131072) for new in (2048, 4096, 8192, 16384)]
PAGED = {"flash-attn-3": (16, 64, 128, 256), "flash-attn-2": (256,), "flashinfer": (16,)}
SCALE = HEAD_DIM**-0.5
MAPPED_TOO = 16384  # whole prompts from here on are timed with mapping as well


def shapes() -> list[tuple[int, int]]:
    """(new, total): whole prompts, then the last chunk of longer ones."""
    return [(length, length) for length in WHOLE] + CHUNKS


def flops(new: int, total: int) -> float:
    """Of the two products, below the diagonal only."""
    return 4.0 * NUM_HEADS * HEAD_DIM * new * (total - (new - 1) / 2)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In float32, of the last queries: q ``[n, heads, d]``, k and v ``[m, kv_heads, d]``."""
    n, m = len(q), len(k)
    query = q.float().unflatten(1, (NUM_KV_HEADS, -1))
    hidden = torch.arange(m, device=q.device)[None] > torch.arange(m - n, m, device=q.device)[:, None]
    out = []
    for head in range(NUM_KV_HEADS):
        scores = torch.einsum("ngd,td->gnt", query[:, head], k[:, head].float()) * SCALE
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("gnt,td->ngd", weights, v[:, head].float()))
    return torch.stack(out, 1).flatten(1, 2)


def flash_attention(name: str) -> tuple[Callable[..., Any], str] | None:
    """The package's function for KV caches, and its name for a block table; None where it is missing."""
    if get(name).supports(torch.device("cuda"), torch.bfloat16, HEAD_DIM) is not None:
        return None
    if name == "flash-attn-3":
        from flash_attn_interface import flash_attn_with_kvcache

        return flash_attn_with_kvcache, "page_table"
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache, "block_table"


def in_blocks(rows: torch.Tensor, block_tokens: int, order: torch.Tensor) -> torch.Tensor:
    """``[blocks, block_tokens, kv_heads, head_dim]``: the rows' blocks lie in that order."""
    pool = torch.empty(len(order), block_tokens, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    pool[order.long()] = rows.unflatten(0, (-1, block_tokens))
    return pool


def launches(cache: KVCache, slot: int, layer: int, q: torch.Tensor) -> Iterator[tuple[str, Launch]]:
    """Every system for one layer of a sequence in the cache; q ``[new, heads, head_dim]``."""
    rows_k, rows_v = cache.rows(slot, layer)
    new, total = len(q), len(rows_k)
    batch = AttentionBatch.build([slot], [new], [total], q.device)
    k, v = rows_k.clone(), rows_v.clone()
    lengths = torch.tensor([total], dtype=torch.int32, device=q.device)
    for name in ("flash-attn-3", "flash-attn-2"):
        if (found := flash_attention(name)) is None:
            print(f"{name}: not here")
            continue
        function, table = found

        def over(pool_k: torch.Tensor, pool_v: torch.Tensor, function: Any = function, **tables: Any) -> torch.Tensor:
            return function(q[None], pool_k, pool_v, cache_seqlens=lengths, softmax_scale=SCALE, causal=True, **tables)[
                0
            ]

        backend = get(name)
        system = "vattn" if name == "flash-attn-3" else f"vattn-{name}"
        yield system, lambda backend=backend: backend(q, cache.k(layer), cache.v(layer), batch, scale=SCALE)
        yield f"{name}-contiguous", lambda over=over: over(k[None], v[None])
        for block_tokens in PAGED[name]:
            order = torch.randperm(total // block_tokens, device=q.device).int()
            pools = [in_blocks(x, block_tokens, order) for x in (k, v)]
            yield (
                f"{name}-paged-{block_tokens}",
                lambda over=over, pools=pools, tables={table: order[None]}: over(*pools, **tables),
            )
    try:
        import flashinfer
    except ImportError as error:
        print(f"flashinfer: {error}")
        return
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    starts = torch.tensor([0, new], dtype=torch.int32)
    heads, options = (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM), {"causal": True, "q_data_type": q.dtype}
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa2")
    ragged.plan(starts, torch.tensor([0, total], dtype=torch.int32), *heads, **options)
    yield "flashinfer-contiguous", lambda: ragged.run(q, k, v)
    for block_tokens in PAGED["flashinfer"]:
        order = torch.randperm(total // block_tokens, device=q.device).int()
        pools = tuple(in_blocks(x, block_tokens, order) for x in (k, v))
        paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace.clone(), "NHD", backend="fa2")
        paged.plan(
            starts,
            torch.tensor([0, len(order)], dtype=torch.int32),
            order.cpu(),
            torch.tensor([block_tokens], dtype=torch.int32),
            *heads,
            block_tokens,
            **options,
        )
        yield f"flashinfer-paged-{block_tokens}", lambda paged=paged, pools=pools: paged.run(q, pools)


def run_shape(records: Records, new: int, total: int) -> None:
    case = f"8B new={new} total={total}"
    records.add(case, "limit", "prefill_attention", "ms", [flops(new, total) / DENSE_FLOPS * 1e3])
    layout = KVLayout(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, total + 256, torch.bfloat16)
    with KVCache(layout, 1, "cuda", over_read_tokens=191) as cache:
        slot = cache.acquire()
        cache.ensure(slot, total)
        for rows in cache.rows(slot, 16):
            rows.normal_()
        q = torch.randn(new, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        expected = reference(q[-16:], *cache.rows(slot, 16))
        systems = {}
        with records.going_on(case):
            for system, launch in launches(cache, slot, 16, q):
                with records.going_on(f"{case} {system}"):
                    error = (launch()[-16:].float() - expected).abs().max().item()
                    assert error < 2e-2 * expected.abs().max().item() + 1e-3, f"{case} {system}: off by {error}"
                    systems[system] = launch
        events: dict[str, list[Any]] = {system: [] for system in systems}
        order = list(systems)
        # In turn, in an order drawn anew each time: a hot GPU is slower, and what ran before says how hot it is.
        drawn = records.drawn(case)
        for _ in range(len(order) if flops(new, total) < 40e12 else 4):
            for system in drawn.sample(order, len(order)):
                events[system].append(timed(systems[system]))
        torch.cuda.synchronize()
        for system, pairs in events.items():
            records.add(case, system, "prefill_attention", "ms", [start.elapsed_time(end) for start, end in pairs])
        if new == total >= MAPPED_TOO and "vattn" in systems:
            with records.going_on(f"{case} mapping"):
                run_mapping(records, cache, slot, total, systems)
        del systems
    gc.collect()
    torch.cuda.empty_cache()


def run_first_calls(records: Records, tokens: int = 8192) -> None:
    """What a process's first call takes, the first over fresh pages, the second, and one that the GPU waits for."""
    case = f"8B new={tokens} total={tokens}"
    q = torch.randn(tokens, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    backend = get("flash-attn-3")
    if reason := backend.supports(q.device, q.dtype, HEAD_DIM):
        print(f"flash-attn-3: {reason}")
        return
    batch = AttentionBatch.build([0], [tokens], [tokens], q.device)
    samples: dict[str, list[float]] = {}
    for written in (True, False):
        for _ in range(6):
            layout = KVLayout(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, tokens + 256)
            with KVCache(layout, 1, "cuda", over_read_tokens=191) as cache:
                cache.ensure(cache.acquire(), tokens)
                if written:
                    for rows in cache.rows(0, 16):
                        rows.normal_()
                torch.cuda.synchronize()

                def launch(cache: KVCache = cache) -> torch.Tensor:
                    return backend(q, cache.k(16), cache.v(16), batch, scale=SCALE)

                if not samples:  # nobody has called this kernel yet
                    torch.cuda.synchronize()
                    start, end = timed(launch, busy=False)
                    torch.cuda.synchronize()
                    samples["first-of-process written"] = [start.elapsed_time(end)]
                calls = [timed(launch), timed(launch)]
                torch.cuda.synchronize()
                idle = timed(launch, busy=False)
                torch.cuda.synchronize()
                state = "written" if written else "untouched"
                names = (f"first {state}", f"second {state}", f"idle {state}")
                for name, (start, end) in zip(names, (*calls, idle), strict=True):
                    samples.setdefault(name, []).append(start.elapsed_time(end))
    for name, values in samples.items():
        call, state = name.split()
        records.add(f"{case} call={call} pages={state}", "vattn", "prefill_attention_call", "ms", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="at most 16,384 tokens")
    options = parser.parse_args()
    records = Records("08_prefill_attention", options.quick)
    run_first_calls(records)  # first, for the process's very first call
    for new, total in shapes():
        if total <= 16384 or not options.quick:
            run_shape(records, new, total)
            records.write()
    records.end()


if __name__ == "__main__":
    main()
