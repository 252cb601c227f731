"""How many sequences fit: one reservation each, pages per layer, blocks of 16 tokens, and vattn. See README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, takewhile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from traces import MAX_SEQ_LEN, SHAPES, TRACES, Trace

from vattn import KVCache, KVLayout
from vattn.driver import Driver, HostDriver, LedgerDriver
from vattn.errors import OutOfPages

GIB = 1 << 30
BLOCK = 16  # tokens of a block of the paged layout
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


def in_cache(cache: KVCache, trace: Trace, seed: int, shares: bool) -> int:
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


def check_counters(cache: KVCache, num_live: int, rows: int) -> None:
    """What the cache says of itself is what arithmetic, and where it can tell the system, say."""
    cache.check_integrity()
    stats = cache.stats()
    assert stats.num_live_slots == num_live
    assert stats.row_bytes == rows * cache.layout.bytes_per_token
    assert stats.waste_bytes <= stats.mapped_bytes - stats.row_bytes  # the last, refused one left its pages parked
    assert stats.physical_bytes <= stats.memory_limit_bytes
    assert stats.physical_bytes == stats.in_use_bytes + stats.parked_bytes + stats.free_bytes
    assert stats.num_create * stats.page_bytes <= stats.peak_physical_bytes == stats.physical_bytes
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
) -> int:
    layout = KVLayout(*shape, MAX_SEQ_LEN, torch.bfloat16, order)
    with KVCache(layout, 4096, driver=open_driver(), memory_limit=limit, over_read_tokens=over_read_tokens) as cache:
        return in_cache(cache, trace, seed, shares)


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
                }
                case = f"driver={place} limit={limit // GIB}GiB shape={name} trace={trace_name}"
                found = {system: [admit(seed) for seed in seeds] for system, admit in systems.items()}
                for system, counts in found.items():
                    records.add(case, system, "sequences", "sequences", counts)
                for peer in ("paged-16", "layer-major"):  # of the same arrivals
                    ratios = [ours / theirs for ours, theirs in zip(found["vattn"], found[peer], strict=True)]
                    records.add(case, "vattn", f"over_{peer}", "ratio", ratios)
    records.write()


if __name__ == "__main__":
    main()
