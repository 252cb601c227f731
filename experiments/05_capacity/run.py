"""How many sequences fit: one reservation each, pages per layer, blocks of 16 tokens, and vattn. See README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from traces import MAX_SEQ_LEN, SHAPES, TRACES, Trace

from vattn import KVCache, KVLayout
from vattn.driver import Driver, HostDriver, LedgerDriver
from vattn.engine.prefix_index import PrefixIndex
from vattn.errors import OutOfPages

GIB = 1 << 30
BLOCK = 16  # tokens of a block of the paged layout
LARGEST = 64 << 20  # bytes of the largest pages, as an engine has them
MARGIN = 191  # rows that FlashAttention-3 may read past the end of a sequence


def admitted_by_rule(trace: Trace, seed: int, capacity: int, prompt_cost: int, cost: Callable[[int], int]) -> int:
    """Sequences, in their order, until one does not fit: what each costs is arithmetic."""
    taken = accumulate((cost(own) for own in trace.arrivals(seed)), initial=prompt_cost)
    return sum(1 for _ in takewhile(lambda total: total <= capacity, taken)) - 1


def full(layout: KVLayout, trace: Trace, seed: int, limit: int) -> int:
    """One tensor for the longest sequence there may be, for each."""
    return admitted_by_rule(trace, seed, limit, 0, lambda own: layout.bytes_per_token * MAX_SEQ_LEN)


def paged(layout: KVLayout, trace: Trace, seed: int, limit: int) -> int:
    """Blocks of 16 tokens of all layers; whole blocks of the prompt are shared, a part of one is copied."""
    prompt, rest = -(-trace.prompt_tokens // BLOCK), trace.prompt_tokens % BLOCK
    blocks = limit // (layout.bytes_per_token * BLOCK)
    return admitted_by_rule(trace, seed, blocks, prompt, lambda own: -(-(rest + own) // BLOCK))


def by_fork(cache: KVCache, trace: Trace, seed: int, shares: bool) -> int:
    """The same with a cache; afterwards its counters have to agree with the system's and with each other."""
    prompt = trace.prompt_tokens
    count, rows, parent = 0, 0, None
    if prompt and shares:
        parent = cache.acquire()
        cache.ensure(parent, prompt)
        rows = prompt
    with suppress(OutOfPages):
        for own in trace.arrivals(seed):
            slot = cache.acquire() if parent is None else cache.fork(parent)
            try:
                cache.ensure(slot, prompt + own)
            except OutOfPages:
                cache.release(slot)
                raise
            count, rows = count + 1, rows + prompt + own
    check_counters(cache, count + (parent is not None), rows)
    return count


def by_index(cache: KVCache, trace: Trace, seed: int) -> int:
    """As an engine does: one request with the prompt has ended and is stored, and the others are found by tokens."""
    index, prompt, count, rows = PrefixIndex(), np.arange(trace.prompt_tokens, dtype=np.int32), 0, 0
    if trace.prompt_tokens:
        first = cache.acquire()
        cache.ensure(first, trace.prompt_tokens)
        index.put(first, None, prompt)
        cache.store(first)
    with suppress(OutOfPages):
        for number, own in enumerate(trace.arrivals(seed)):
            tokens = np.concatenate((prompt, np.full(own, -1 - number, np.int32)))
            slot = _begin(cache, index, tokens)
            try:
                cache.ensure(slot, len(tokens))
            except OutOfPages:
                cache.release(slot)
                raise
            index.put(slot, None, tokens)
            count, rows = count + 1, rows + len(tokens)
    check_counters(cache, count, rows)
    return count


def _begin(cache: KVCache, index: PrefixIndex, tokens: np.ndarray) -> int:
    """A slot that begins with the rows that a live or the stored sequence has of these tokens."""
    versions, stored = cache.stored()
    for length, slots in index.find(None, tokens):
        for slot in slots:
            if versions[slot] < 0:
                return cache.fork(slot, length)
            if stored[slot] >= length:
                return cache.fork(slot, length, version=int(versions[slot]))
    return cache.acquire(expect_len=len(tokens))


def check_counters(cache: KVCache, num_live: int, rows: int) -> None:
    """What the cache says of itself is what arithmetic, and where it can tell the system, say."""
    cache.check_integrity()
    stats = cache.stats()
    assert stats.num_live_slots == num_live
    assert stats.row_bytes == rows * cache.layout.bytes_per_token
    assert stats.waste_bytes <= stats.mapped_bytes - stats.row_bytes  # the last, refused one left its pages parked
    assert stats.physical_bytes <= stats.memory_limit_bytes
    assert stats.physical_bytes == stats.in_use_bytes + stats.parked_bytes + stats.free_bytes
    assert stats.peak_physical_bytes == stats.physical_bytes
    if cache.max_page_bytes == cache.page_bytes:  # else a free large page is given up for small ones
        assert stats.num_create * stats.page_bytes <= stats.physical_bytes
    assert stats.num_oom == 1
    assert cache.driver.allocated_bytes() in (None, stats.physical_bytes)


def with_vattn(
    open_driver: Callable[[], Driver],
    shape: tuple[int, int, int],
    order: str,
    trace: Trace,
    seed: int,
    limit: int,
    shares: bool = True,
    over_read_tokens: int = 0,
    as_engine: bool = False,
) -> int:
    layout = KVLayout(*shape, MAX_SEQ_LEN, torch.bfloat16, order)
    with KVCache(
        layout,
        4096,
        driver=open_driver(),
        memory_limit=limit,
        over_read_tokens=over_read_tokens,
        max_page_bytes=LARGEST if as_engine else None,
    ) as cache:
        return by_index(cache, trace, seed) if as_engine else by_fork(cache, trace, seed, shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 seeds, and the ledger only")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    seeds = range(3 if options.quick else options.seeds)
    places: dict[str, tuple[Callable[[], Driver], int]] = {"ledger": (lambda: LedgerDriver(80 * GIB), 60 * GIB)}
    if not options.quick:
        places["host"] = (HostDriver, 4 * GIB)
    records = Records("05_capacity", options.quick)
    for place, (open_driver, limit) in places.items():
        for name, shape in SHAPES.items():
            layout = KVLayout(*shape, MAX_SEQ_LEN, torch.bfloat16)
            for trace_name, trace in TRACES.items():
                common = (open_driver, shape)
                systems: dict[str, Callable[[int], int]] = {
                    "full": lambda seed: full(layout, trace, seed, limit),  # noqa: B023
                    # The paper's layout; sequences do not share.
                    "layer-major": lambda seed: with_vattn(*common, "layer", trace, seed, limit, shares=False),  # noqa: B023
                    "paged-16": lambda seed: paged(layout, trace, seed, limit),  # noqa: B023
                    "vattn": lambda seed: with_vattn(*common, "token", trace, seed, limit),  # noqa: B023
                    "vattn-margin": lambda seed: with_vattn(
                        *common,  # noqa: B023
                        "token",
                        trace,  # noqa: B023
                        seed,
                        limit,  # noqa: B023
                        over_read_tokens=MARGIN,
                    ),
                    "vattn-engine": lambda seed: with_vattn(*common, "token", trace, seed, limit, as_engine=True),  # noqa: B023
                }
                case = f"driver={place} limit={limit // GIB}GiB shape={name} trace={trace_name}"
                found = {system: [admit(seed) for seed in seeds] for system, admit in systems.items()}
                for system, counts in found.items():
                    records.add(case, system, "sequences", "sequences", counts)
                for system, peer in (("vattn", "paged-16"), ("vattn", "layer-major"), ("vattn-engine", "paged-16")):
                    # of the same arrivals
                    ratios = [ours / theirs for ours, theirs in zip(found[system], found[peer], strict=True)]
                    records.add(case, system, f"over_{peer}", "ratio", ratios)
    records.write()


if __name__ == "__main__":
    main()
