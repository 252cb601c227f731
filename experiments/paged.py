"""The layout that vattn is compared with: a pool of blocks, and a block table for each sequence.

``PagedKVCache`` offers what ``vattn.KVCache`` offers to a model and a decode loop, so the same model, fused operations
and captured graphs run on either layout; ``paged_ops`` and the backends in ``paged_attention`` look blocks up. The
design is that of PagedAttention (Kwon et al. 2023, arXiv 2309.06180): whole blocks are shared by reference count, the
block in which a fork ends is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vattn import KVLayout
from vattn.errors import ConfigError, OutOfPages, OutOfSlots
from vattn.ops.ops_table import Ops
from vattn.ops.rope_append import rope_append_reference


class PagedKVCache:
    """K and V in blocks of ``block_tokens`` tokens of one layer each; a block index means the same in every layer.

    For one stream at a time: what a sequence gives back, the next may get while work that reads it is still queued.

    Args:
        layout: layers of one shape.
        max_slots: sequences at a time.
        num_blocks: of the pool; the memory is taken at once. One more is nobody's: entries of the table that nobody has
            set lead there, as they do while a step is captured.
        block_tokens: tokens of a block.

    Attributes:
        block_table: ``[max_slots, blocks of max_seq_len]`` int32, on the device; brought up to date by ``step``.
        num_uploads, num_entries: how often that took a copy, and of how many entries in all.
    """

    over_read_tokens = 0
    over_read_masked = True

    def __init__(
        self, layout: KVLayout, max_slots: int, device: torch.device | str, *, num_blocks: int, block_tokens: int = 16
    ) -> None:
        (group,) = layout.groups
        if group.v_head_dim not in (None, group.head_dim):
            raise ConfigError("K and V heads must be of one size")
        self.layout, self.max_slots, self.device = layout, max_slots, torch.device(device)
        self.block_tokens, self.num_blocks = block_tokens, num_blocks
        self.page_bytes = block_tokens * layout.bytes_per_token
        shape = (len(layout.layers), 2, 1 + num_blocks, block_tokens, group.num_kv_heads, group.head_dim)
        self._pool = torch.zeros(shape, dtype=layout.dtype, device=self.device)
        self._views = {layer: self._pool[i].unbind() for i, layer in enumerate(layout.layers)}
        self.max_blocks = -(-layout.max_seq_len // block_tokens)
        self.block_table = torch.zeros(max_slots, self.max_blocks, dtype=torch.int32, device=self.device)
        self._free = list(range(num_blocks, 0, -1))
        self._users = [0] * (1 + num_blocks)
        self._blocks: dict[int, list[int]] = {}  # of each live slot
        self._seq_lens = np.zeros(max_slots, np.int64)
        self._num_blocks_of = np.zeros(max_slots, np.int64)
        self._changed: dict[tuple[int, int], int] = {}  # (slot, index) -> block: the newest, not in block_table yet
        self._lock = threading.RLock()
        self.num_uploads = self.num_entries = 0

    # -- slots ---------------------------------------------------------------------------------------------------
    def acquire(self, slot: int | None = None) -> int:
        """Take a slot, the lowest free one unless a free one is named."""
        with self._lock:
            free = [each for each in range(self.max_slots) if each not in self._blocks]
            if slot is None and not free:
                raise OutOfSlots(f"all {self.max_slots} slots are taken")
            slot = free[0] if slot is None else slot
            if slot not in free:
                raise ConfigError(f"slot {slot} is not free")
            self._blocks[slot] = []
            self._seq_lens[slot] = 0
            return slot

    def release(self, slot: int) -> None:
        """End a sequence."""
        with self._lock:
            self.truncate(slot, 0)
            del self._blocks[slot]

    def seq_len(self, slot: int) -> int:
        """Rows backed on request."""
        if slot not in self._blocks:
            raise ConfigError(f"slot {slot} holds no sequence")
        return int(self._seq_lens[slot])

    def versions(self, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """Zeros: nobody changes a sequence behind the loop's back here, so there is nothing to tell apart."""
        return np.zeros(len(slots), np.int64)

    def blocks(self, slot: int) -> list[int]:
        """A live slot's blocks, in the order of its rows."""
        return self._blocks[slot]

    # -- rows ----------------------------------------------------------------------------------------------------
    def ensure(self, slot: int, seq_len: int) -> None:
        """Back rows ``[0, seq_len)`` of a slot."""
        self.ensure_batch([slot], [seq_len])

    def ensure_batch(
        self,
        slots: Sequence[int] | np.ndarray,
        seq_lens: Sequence[int] | np.ndarray,
        *,
        wait: bool = True,
        versions: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """The same for several, all or nothing. Never waits, whatever ``wait`` says, and looks at no ``versions``.

        Raises:
            OutOfPages: the pool has no blocks for them.
        """
        with self._lock:
            slots, seq_lens = np.asarray(slots), np.asarray(seq_lens)
            wanted = -(-seq_lens // self.block_tokens)
            short = np.flatnonzero(wanted > self._num_blocks_of[slots])
            missing = [
                (slot, count - len(self._blocks[slot]))
                for slot, count in zip(slots[short].tolist(), wanted[short].tolist(), strict=True)
            ]
            total = sum(count for _, count in missing)
            if total > len(self._free):
                raise OutOfPages(f"asked for {total} blocks, {len(self._free)} are free", asked_bytes=total)
            for slot, count in missing:
                for _ in range(count):
                    self._append(slot, self._free.pop())
            self._seq_lens[slots] = np.maximum(self._seq_lens[slots], seq_lens)

    def _append(self, slot: int, block: int) -> None:
        blocks = self._blocks[slot]
        self._changed[slot, len(blocks)] = block
        blocks.append(block)
        self._num_blocks_of[slot] = len(blocks)
        self._users[block] += 1

    def truncate(self, slot: int, seq_len: int) -> None:
        """Keep the first rows, give back whole blocks past them."""
        with self._lock:
            blocks = self._blocks[slot]
            while len(blocks) > -(-seq_len // self.block_tokens):
                block = blocks.pop()
                self._users[block] -= 1
                if not self._users[block]:
                    self._free.append(block)
            self._num_blocks_of[slot] = len(blocks)
            self._seq_lens[slot] = min(self._seq_lens[slot], seq_len)

    def fork(self, parent: int, seq_len: int | None = None) -> int:
        """A new slot with the parent's first rows: whole blocks shared, a part of one copied."""
        with self._lock:
            rows = self.seq_len(parent) if seq_len is None else seq_len
            whole, rest = divmod(rows, self.block_tokens)
            if rest and not self._free:
                raise OutOfPages("no block is free for the part of one that is copied")
            child = self.acquire()
            for block in self._blocks[parent][:whole]:
                self._append(child, block)
            if rest:
                self._append(child, self._free.pop())
                self._pool[:, :, self._blocks[child][-1]] = self._pool[:, :, self._blocks[parent][whole]]
            self._seq_lens[child] = rows
            return child

    # -- tensors -------------------------------------------------------------------------------------------------
    def k(self, layer: int) -> torch.Tensor:
        """``[1 + num_blocks, block_tokens, num_kv_heads, head_dim]``."""
        return self._views[layer][0]

    def v(self, layer: int) -> torch.Tensor:
        """``[1 + num_blocks, block_tokens, num_kv_heads, head_dim]``."""
        return self._views[layer][1]

    def rows(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of K and V of one sequence, ``[seq_len, num_kv_heads, head_dim]``."""
        index = torch.tensor(self._blocks[slot], dtype=torch.int64, device=self.device)
        k, v = (view[index].flatten(0, 1)[: self.seq_len(slot)] for view in self._views[layer])
        return k, v

    def write(self, slot: int, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put the rows of one sequence in place, from row 0 on."""
        position = torch.arange(len(k), device=self.device)
        index = torch.tensor(self._blocks[slot], dtype=torch.int64, device=self.device)
        where = (index[position // self.block_tokens], position % self.block_tokens)
        for view, rows in zip(self._views[layer], (k, v), strict=True):
            view.index_put_(where, rows)

    @contextmanager
    def step(
        self, slots: Sequence[int] | np.ndarray, *, versions: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[None]:
        """Bring ``block_table`` up to date, in the order of the current stream."""
        with self._lock:
            changed, self._changed = self._changed, {}
        if changed:
            entries = torch.tensor([(*place, block) for place, block in changed.items()]).T.contiguous()
            if self.device.type == "cuda":
                entries = entries.pin_memory().to(self.device, non_blocking=True)
            self.block_table.index_put_((entries[0], entries[1]), entries[2].int())
            self.num_uploads += 1
            self.num_entries += len(changed)
        yield

    # -- the end -------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Every block is free or used, as often as tables name it."""
        users = [0] * len(self._users)
        for slot, blocks in self._blocks.items():
            assert len(blocks) == self._num_blocks_of[slot] >= -(-int(self._seq_lens[slot]) // self.block_tokens)
            for block in blocks:
                users[block] += 1
        assert users == self._users
        assert not users[0]
        assert sorted(self._free) == [block for block, count in enumerate(users) if block and not count]

    def close(self) -> None:
        """Drop the memory."""
        self._views.clear()
        self._pool = self.block_table = torch.empty(0)

    def __enter__(self) -> PagedKVCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PagedStep:
    """What every layer of a decode step needs of the block table, looked up by one kernel at the step's first layer.

    Attributes:
        page_table: ``[batch, max_blocks]`` int32, the rows of the batch's slots.
        block_slots: ``[batch]`` int32. The append kernel finds a token at ``slot * block_tokens + row``, so a "slot" of
            the new row's block, less the blocks before it, leads to that row.
    """

    def __init__(self, cache: PagedKVCache, batch_size: int) -> None:
        self.cache = cache
        shape = (batch_size, cache.max_blocks)
        self.page_table = torch.zeros(shape, dtype=torch.int32, device=cache.device)
        self.block_slots = torch.zeros(batch_size, dtype=torch.int32, device=cache.device)

    def look_up(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """``slots`` and ``rows``: ``[batch]`` int32."""
        cache = self.cache
        if cache.device.type == "cuda":
            grid = (slots.shape[0], -(-cache.max_blocks // 1024))
            _look_up_kernel()[grid](
                slots, rows, cache.block_table, self.page_table, self.block_slots, cache.max_blocks, cache.block_tokens
            )
            return
        torch.index_select(cache.block_table, 0, slots, out=self.page_table)
        index = rows.long() // cache.block_tokens
        self.block_slots.copy_(self.page_table.gather(1, index[:, None])[:, 0] - index)


def _look_up_kernel() -> Any:
    global _KERNEL
    if _KERNEL is None:
        import triton
        import triton.language as tl

        @triton.jit
        def look_up_kernel(slots, rows, table, page_table, block_slots, max_blocks, block_tokens):  # type: ignore[no-untyped-def]
            token = tl.program_id(0)
            slot = tl.load(slots + token).to(tl.int64)
            columns = tl.program_id(1) * 1024 + tl.arange(0, 1024)
            inside = columns < max_blocks
            found = tl.load(table + slot * max_blocks + columns, mask=inside, other=0)
            tl.store(page_table + token.to(tl.int64) * max_blocks + columns, found, mask=inside)
            if tl.program_id(1) == 0:
                index = tl.load(rows + token) // block_tokens
                tl.store(block_slots + token, tl.load(table + slot * max_blocks + index) - index)

        _KERNEL = look_up_kernel
    return _KERNEL


_KERNEL: Any = None


def paged_ops(ops: Ops, cache: PagedKVCache) -> tuple[Ops, dict[int, PagedStep]]:
    """The same operations over a paged cache, and the steps (by batch size) that attention finds its tables in."""
    steps: dict[int, PagedStep] = {}
    first = cache.k(cache.layout.layers[0]).data_ptr()

    def rope_append(
        qkv: torch.Tensor,
        table: torch.Tensor,
        slots: torch.Tensor,
        rows: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *norms: Any,
    ) -> torch.Tensor:
        step = steps.get(slots.shape[0])
        if step is None:
            step = steps[slots.shape[0]] = PagedStep(cache, slots.shape[0])
        if k_cache.data_ptr() == first:
            step.look_up(slots, rows)
        if ops.name != "reference":
            return ops.rope_append(qkv, table, step.block_slots, rows, k_cache, v_cache, *norms)
        # Eagerly K and V are turned in a scratch sequence for each token, then put where they belong.
        index, length = torch.arange(len(rows), device=rows.device), int(rows.max()) + 1
        k, v = (pool.new_zeros(len(rows), length, *pool.shape[2:]) for pool in (k_cache, v_cache))
        q = rope_append_reference(qkv, table, index, rows, k, v, *norms)
        where = ((step.block_slots + rows // cache.block_tokens).long(), (rows % cache.block_tokens).long())
        k_cache.index_put_(where, k[index, rows.long()])
        v_cache.index_put_(where, v[index, rows.long()])
        return q

    return replace(ops, rope_append=rope_append, rope_in_attention=False), steps
