"""Page size against fragmentation and batch size: vattn's layout, pages per layer, and blocks. See README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from traces import MAX_SEQ_LEN, SHAPES, TRACES

from vattn import KVCache, KVLayout
from vattn.driver import LedgerDriver
from vattn.errors import OutOfPages

KIB, GIB = 1 << 10, 1 << 30
LIMIT = 60 * GIB
PAGE_KIB = (64, 256, 2048, 8192, 32768)
BLOCK_TOKENS = (16, 64, 128, 256)


def in_cache(layout: KVLayout, page_bytes: int, lengths: Iterator[int]) -> tuple[int, float]:
    """(sequences until one does not fit, share of the mapped bytes that holds no row)."""
    count = 0
    with KVCache(
        layout,
        4096,
        driver=LedgerDriver(80 * GIB, min(page_bytes, 2048 * KIB)),
        page_bytes=page_bytes,
        memory_limit=LIMIT,
    ) as cache:
        with suppress(OutOfPages):
            for length in lengths:
                slot = cache.acquire()
                try:
                    cache.ensure(slot, length)
                except OutOfPages:
                    cache.release(slot)
                    raise
                count += 1
        stats = cache.stats()
        assert stats.num_live_slots == count
        assert stats.waste_bytes == stats.mapped_bytes - stats.row_bytes
        return count, stats.waste_bytes / stats.mapped_bytes


def in_blocks(layout: KVLayout, block_tokens: int, lengths: Iterator[int]) -> tuple[int, float]:
    """The same for a block table, by arithmetic."""
    free, count, tokens, taken = LIMIT // (layout.bytes_per_token * block_tokens), 0, 0, 0
    for length in lengths:
        blocks = -(-length // block_tokens)
        if taken + blocks > free:
            return count, 1 - tokens / (taken * block_tokens)
        count, tokens, taken = count + 1, tokens + length, taken + blocks
    raise AssertionError("the arrivals do not end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, no pages under 2 MiB")
    options = parser.parse_args()
    seeds = range(1 if options.quick else 5)
    records = Records("09_page_size", options.quick)
    trace = TRACES["log-normal"]
    for name, shape in SHAPES.items():
        found: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for seed in seeds:
            for page_kib in PAGE_KIB[2 if options.quick else 0 :]:
                for system, order in (("vattn", "token"), ("layer-major", "layer")):
                    layout = KVLayout(*shape, MAX_SEQ_LEN, torch.bfloat16, order)
                    found.setdefault((f"page={page_kib}KiB", system), []).append(
                        in_cache(layout, page_kib * KIB, trace.arrivals(seed))
                    )
            layout = KVLayout(*shape, MAX_SEQ_LEN, torch.bfloat16)
            for block_tokens in BLOCK_TOKENS:
                found.setdefault(("", f"paged-{block_tokens}"), []).append(
                    in_blocks(layout, block_tokens, trace.arrivals(seed))
                )
        for (page, system), results in found.items():
            case = f"shape={name} trace=log-normal limit={LIMIT // GIB}GiB {page}".strip()
            records.add(case, system, "sequences", "sequences", [count for count, _ in results])
            records.add(case, system, "waste", "ratio", [share for _, share in results])
    records.write()


if __name__ == "__main__":
    main()
