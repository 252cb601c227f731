"""The paged layout of the experiments computes what vattn's does: the comparison is of layouts, nothing else."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from helpers.decode import by_slot, eager, prefill, prompts_for
from helpers.llama import hf_model_of, open_cache, same_in_vattn

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
from paged import PagedKVCache, PagedStep, paged_ops
from paged_attention import PagedFlashAttention2, PagedFlashAttention3, PagedReference

from vattn import KVLayout
from vattn.decode.loop import DecodeLoop
from vattn.errors import ConfigError, OutOfPages, OutOfSlots
from vattn.models import FusedLlama, Llama
from vattn.ops.ops_table import reference_ops
from vattn.ops.rope_append import rope_append, rope_append_reference, rope_table
from vattn.ops.triton_support import unavailable
from vattn.tuning.table import default_ops

LAYOUT = KVLayout(2, 2, 16, 200, torch.float32)


def copied(model: Llama, prompts: list[list[int]], paged: PagedKVCache) -> list[int]:
    """Slots with the K and V of all but each prompt's last token, computed in a cache of vattn's."""
    slots = []
    with open_cache(model, len(prompts)) as cache:
        for prompt in prompts:
            source, slot = prefill(model, cache, prompt), paged.acquire()
            paged.ensure(slot, cache.seq_len(source))
            for layer in cache.layout.layers:
                paged.write(slot, layer, *cache.rows(source, layer))
            slots.append(slot)
    return slots


@pytest.mark.parametrize("block_tokens", [1, 16, 64])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_same_loop_on_either_layout(kind, block_tokens):
    model = same_in_vattn(hf_model_of(kind))
    prompts = prompts_for(model, 4)
    expected = eager(model, prompts, 40)
    num_blocks = 1 + sum(-(-(len(prompt) + 40) // block_tokens) for prompt in prompts)
    with PagedKVCache(model.kv_layout(), 6, "cpu", num_blocks=num_blocks, block_tokens=block_tokens) as paged:
        slots = copied(model, prompts, paged)
        ops, steps = paged_ops(reference_ops(), paged)
        with DecodeLoop(FusedLlama(model, ops=ops), paged, attention=PagedReference(paged, steps)) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 40)
            found = by_slot(loop.run())
        assert [tuple(found[slot]) for slot in slots] == expected
        paged.check_integrity()
        assert paged.num_uploads > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "block_tokens"),
    [(PagedFlashAttention3, 16), (PagedFlashAttention3, 64), (PagedFlashAttention3, 256), (PagedFlashAttention2, 256)],
)
def test_the_same_loop_on_a_gpu(backend, block_tokens):
    """In a graph, in bfloat16, where two near logits may change places: so what is compared is what the cache holds."""
    device, dtype = torch.device("cuda:0"), torch.bfloat16
    model = same_in_vattn(hf_model_of("llama", head_dim=64)).to(device, dtype)
    prompts = prompts_for(model, 4)
    with PagedKVCache(model.kv_layout(), 6, device, num_blocks=200, block_tokens=block_tokens) as paged:
        slots = copied(model, prompts, paged)
        ops, steps = paged_ops(default_ops(device, dtype), paged)
        attention = backend(paged, steps)
        if reason := attention.supports(device, dtype, 64):
            pytest.skip(reason)
        with DecodeLoop(FusedLlama(model, ops=ops), paged, attention=attention) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 40)
            found = by_slot(loop.run())
        paged.check_integrity()
        for slot, prompt in zip(slots, prompts, strict=True):
            # What the loop wrote is what the eager model computes of the loop's own tokens: the last layer's, which
            # depends on the attention of those before it.
            text = [*prompt, *found[slot][:-1]]
            with open_cache(model, 1) as cache:
                last = model.config.num_layers - 1
                expected = cache.rows(prefill(model, cache, [*text, 0]), last)
                for got, wanted in zip(paged.rows(slot, last), expected, strict=True):
                    torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_the_append_kernel_on_blocks(device):
    """One kernel for both layouts: a block's "slot" leads it to the row."""
    paged = PagedKVCache(LAYOUT, 5, device, num_blocks=70, block_tokens=16)
    slots = [paged.acquire() for _ in range(5)]
    random.Random(1).shuffle(paged._free)
    paged.ensure_batch(slots, [200, 17, 33, 16, 1])
    with paged.step(slots):
        pass
    chosen = torch.tensor([4, 0, 2, 3, 1, 0], dtype=torch.int32, device=device)
    rows = torch.tensor([0, 199, 32, 15, 16, 3], dtype=torch.int32, device=device)
    qkv = torch.randn(6, (4 + 2 * 2) * 16).to(device)
    table = rope_table(10000.0 ** (-torch.arange(0, 16, 2, device=device) / 16), 200)
    step = PagedStep(paged, 6)
    step.look_up(chosen, rows)
    assert torch.equal(step.page_table, paged.block_table[chosen.long()])
    q = rope_append(qkv, table, step.block_slots, rows, paged.k(1), paged.v(1))
    k, v = (torch.zeros(5, 200, 2, 16, device=device) for _ in range(2))
    expected = rope_append_reference(qkv, table, chosen, rows, k, v)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)
    for slot in slots:
        for got, wanted in zip(paged.rows(slot, 1), (k, v), strict=True):
            torch.testing.assert_close(got, wanted[slot, : len(got)], rtol=1e-5, atol=1e-5)
        assert not any(rows.any() for rows in paged.rows(slot, 0))


def test_blocks_are_conserved():
    """Random sequences, forks included, against what a dictionary of lists says."""
    rng, paged = random.Random(2), PagedKVCache(LAYOUT, 8, "cpu", num_blocks=40, block_tokens=16)
    told: dict[int, torch.Tensor] = {}
    for number in range(3000):
        live = list(told)
        action = rng.choice(("acquire", "ensure", "ensure", "truncate", "release", "fork"))
        try:
            if action == "acquire":
                told[paged.acquire()] = torch.empty(0)
            elif live and action == "ensure":
                slot, rows = rng.choice(live), rng.randint(1, 200)
                paged.ensure(slot, rows)
                if rows > len(told[slot]):  # as a decode step does: past the end, in blocks of its own
                    told[slot] = torch.cat([told[slot], torch.full((rows - len(told[slot]),), float(number))])
                    write_own(paged, slot, told[slot])
            elif live and action == "truncate":
                slot = rng.choice(live)
                rows = rng.randint(0, len(told[slot])) // 16 * 16  # a shared block is not written to
                paged.truncate(slot, rows)
                told[slot] = told[slot][:rows]
            elif live and action == "release":
                slot = rng.choice(live)
                paged.release(slot)
                del told[slot]
            elif live and action == "fork":
                parent = rng.choice(live)
                rows = rng.randint(0, len(told[parent]))
                told[paged.fork(parent, rows)] = told[parent][:rows].clone()
        except (OutOfPages, OutOfSlots):
            pass
        paged.check_integrity()
    for slot, rows in told.items():
        assert torch.equal(paged.rows(slot, 1)[1][:, 0, 0], rows)
        with paged.step([slot]):
            assert paged.block_table[slot, : len(paged._blocks[slot])].tolist() == paged._blocks[slot]
    with pytest.raises(ConfigError):
        paged.acquire(9)


def write_own(paged: PagedKVCache, slot: int, rows: torch.Tensor) -> None:
    filled = rows[:, None, None].expand(-1, 2, 16)
    for layer in (0, 1):
        paged.write(slot, layer, filled, filled)


def test_the_table_keeps_its_address():
    """A captured graph reads it where it was, whatever it says meanwhile."""
    paged = PagedKVCache(LAYOUT, 3, "cpu", num_blocks=30)
    slot, address = paged.acquire(), paged.block_table.data_ptr()
    for rows in (1, 16, 17, 200):
        paged.ensure(slot, rows)
        with paged.step([slot]):
            assert paged.block_table.data_ptr() == address
            assert paged.block_table[slot, : -(-rows // 16)].tolist() == paged._blocks[slot]
