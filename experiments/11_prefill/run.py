"""Prefill of one prompt end to end on either layout, mapping or block allocation included.

See README.md. Needs an NVIDIA GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from decoding import hf_shape
from paged import PagedKVCache

from vattn import KVCache
from vattn.attention import AttentionBatch, get
from vattn.models import Llama, LlamaConfig

NEEDS = ("cuda",)
DENSE_FLOPS = 989e12  # bfloat16, an H100 SXM's data sheet
TOTALS = (8192, 16384, 32768, 65536)
CHUNK = 8192
FIRST_CHUNK = 2048  # where pages are mapped meanwhile: long enough to hide those of the other 6,144 tokens
SUPER_PAGE_BYTES = 16 << 20
ROUNDS = 4  # the first one makes pages, the others use them again

Prompt = Callable[[], tuple[float, torch.Tensor]]  # computes one: milliseconds, and the logits of its last token


def flops(model: Llama, total: int) -> float:
    """Of all products with weights, and of attention below the diagonal."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.ndim == 2)
    attention = 4.0 * config.num_heads * config.head_dim * config.num_layers * total * (total + 1) / 2
    return 2.0 * weights * total + attention


class Blocks:
    """K or V of a layer, for a model that writes rows of sequences: finds them in their blocks."""

    def __init__(self, prefill: PagedPrefill, pool: torch.Tensor) -> None:
        self.prefill, self.pool, self.dtype = prefill, pool, pool.dtype

    def index_put_(self, rows: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor) -> None:
        """``rows``: slot and position of each value."""
        self.pool.index_put_(self.prefill.where(*rows), values)


class PagedPrefill:
    """Cache and attention in one: FlashAttention-3 over the blocks of one sequence, several new tokens at a time."""

    name, over_read_tokens, masks_over_read, features = "paged-flash-attn-3", 0, True, frozenset[str]()

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self._found: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None

    def k(self, layer: int) -> Blocks:
        return Blocks(self, self.cache.k(layer))

    def v(self, layer: int) -> Blocks:
        return Blocks(self, self.cache.v(layer))

    def where(self, slots: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and row in it of each token; looked up once for all layers of a pass."""
        if self._found is None or self._found[0] is not positions:
            tokens = self.cache.block_tokens
            blocks = self.cache.block_table[slots, positions // tokens].long()
            self._found = (positions, (blocks, positions % tokens))
        return self._found[1]

    def __call__(self, q: torch.Tensor, k: Blocks, v: Blocks, batch: AttentionBatch, **options: Any) -> torch.Tensor:
        from flash_attn_interface import flash_attn_with_kvcache

        slot = batch.slots[0]
        return flash_attn_with_kvcache(
            q[None],
            k.pool,
            v.pool,
            cache_seqlens=batch.seq_lens_int32,
            page_table=self.cache.block_table[slot : slot + 1],
            softmax_scale=options["scale"],
            causal=True,
        )[0]


def prefill_ms(launch: Callable[[int, int], None], prepare: Callable[[int], None], total: int, ahead: bool) -> float:
    """Milliseconds from an idle GPU to the end of the last chunk.

    Args:
        launch: computes tokens from a start to an end.
        prepare: backs rows up to an end.
        ahead: back the rows of a chunk while the one before is computed, and begin with a short one; else all rows
            first.
    """
    ends = [*([FIRST_CHUNK] if ahead else []), *range(CHUNK, total, CHUNK), total]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    prepare(ends[0] if ahead else total)
    for start, end, following in zip([0, *ends], ends, [*ends[1:], None], strict=False):
        launch(start, end)
        if ahead and following is not None:
            prepare(following)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


@contextmanager
def over_vattn(model: Llama, tokens: torch.Tensor, kind: str, page_bytes: int | None = None) -> Iterator[Prompt]:
    total, backend = len(tokens), get("flash-attn-3")
    layout, margin = model.kv_layout(total + 256), backend.over_read_tokens
    limit = total * layout.bytes_per_token + (64 << 20)  # others' pages have to fit beside it
    with KVCache(layout, 1, model.device, limit, page_bytes=page_bytes, over_read_tokens=margin) as cache:

        def prompt() -> tuple[float, torch.Tensor]:
            slot = cache.acquire()
            logits = torch.empty(0)

            def launch(start: int, end: int) -> None:
                nonlocal logits
                batch = AttentionBatch.build([slot], [end - start], [end], model.device)
                with cache.step([slot]):
                    logits = model(tokens[start:end], batch, cache, backend)

            took = prefill_ms(launch, lambda end: cache.ensure(slot, end), total, kind == "overlapped")
            if kind != "parked":
                cache.truncate(slot, 0)  # unmapped, and free for any slot
            cache.release(slot)
            return took, logits

        yield prompt


@contextmanager
def over_blocks(model: Llama, tokens: torch.Tensor, block_tokens: int) -> Iterator[Prompt]:
    total = len(tokens)
    blocks = -(-total // block_tokens) + 1
    with PagedKVCache(
        model.kv_layout(total + 256), 1, model.device, num_blocks=blocks, block_tokens=block_tokens
    ) as cache:
        prefill = PagedPrefill(cache)

        def prompt() -> tuple[float, torch.Tensor]:
            slot = cache.acquire()
            logits = torch.empty(0)

            def prepare(end: int) -> None:
                cache.ensure(slot, end)
                with cache.step([slot]):
                    pass

            def launch(start: int, end: int) -> None:
                nonlocal logits
                batch = AttentionBatch.build([slot], [end - start], [end], model.device)
                logits = model(tokens[start:end], batch, prefill, prefill)  # type: ignore[arg-type]

            took = prefill_ms(launch, prepare, total, False)
            cache.release(slot)
            return took, logits

        yield prompt


def run_case(records: Records, model: Llama, tokens: torch.Tensor) -> None:
    """All systems side by side, in turn, in an order drawn anew each round: a hot GPU is slower."""
    case = f"8B total={len(tokens)} chunk={CHUNK}"
    records.add(case, "limit", "prefill", "ms", [flops(model, len(tokens)) / DENSE_FLOPS * 1e3])
    with over_vattn(model, tokens, "parked") as warm_up:  # kernels are loaded, and the GPU is warm
        _, expected = warm_up()
    with ExitStack() as stack:
        prompts: dict[str, Prompt] = {
            system: stack.enter_context(opened)
            for system, opened in {
                "vattn-parked": over_vattn(model, tokens, "parked"),
                "vattn": over_vattn(model, tokens, "overlapped"),
                "vattn-sync-mapping": over_vattn(model, tokens, "sync"),
                "vattn-16MiB-pages": over_vattn(model, tokens, "overlapped", SUPER_PAGE_BYTES),
                "paged-16": over_blocks(model, tokens, 16),
                "paged-256": over_blocks(model, tokens, 256),
            }.items()
        }
        samples: dict[str, list[float]] = {system: [] for system in prompts}
        order = list(prompts)
        drawn = records.drawn(case)
        for _ in range(ROUNDS):
            for system in drawn.sample(order, len(order)):
                with records.going_on(f"{case} {system}"):
                    took, logits = prompts[system]()
                    error = (logits.float() - expected.float()).abs().max().item()
                    assert error < 2e-2 * expected.abs().max().item(), f"{case} {system}: off by {error}"
                    samples[system].append(took)
    for system, found in samples.items():
        records.add(case, system, "prefill", "ms", found[1:])
        records.add(case, system, "prefill_first", "ms", found[:1])
    gc.collect()
    torch.cuda.empty_cache()
    records.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8,192 and 16,384 tokens only")
    options = parser.parse_args()
    records = Records("11_prefill", options.quick)
    if reason := get("flash-attn-3").supports(torch.device("cuda"), torch.bfloat16, 128):
        raise SystemExit(f"this experiment compares layouts under FlashAttention-3: {reason}")
    model = Llama.random(LlamaConfig.from_hf(hf_shape("8B")), device="cuda", dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    for total in TOTALS[: 2 if options.quick else None]:
        tokens = torch.randint(0, model.config.vocab_size, (total,), device="cuda", generator=generator)
        with torch.inference_mode():
            run_case(records, model, tokens)
    records.end()


if __name__ == "__main__":
    main()
