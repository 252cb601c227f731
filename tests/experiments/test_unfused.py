"""The ends of a decode step in torch's operations, which experiment 04 puts in the kernels' places."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers.decode_ops import plain_sampling

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "04_decode"))
from unfused import sample_in_torch, update_in_torch, updating_twice

from vattn.ops.advance import advance_reference
from vattn.ops.sample_tokens import sample_tokens_reference, scores_reference


def test_update():
    """Live rows, rows at rest, stop tokens, last tokens, and padding that repeats a slot at rest."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        slots = torch.cat((torch.randperm(9, generator=draw)[:6], torch.tensor([9, 9, 9]))).int()
        sampled = torch.randint(0, 5, (9,), generator=draw).int()
        state = [torch.randint(0, 9, (10,), generator=draw).int() for _ in range(2)]
        state.append(torch.randint(0, 3, (10,), generator=draw).int())
        state[2][9] = 0
        stops = torch.randint(-1, 5, (10, 2), generator=draw).int()
        wanted, twice = [x.clone() for x in state], [x.clone() for x in state]
        plain = plain_sampling(10, "cpu", vocab=5)
        ring, counter = torch.full((4, 12, 2), -7, dtype=torch.int32), torch.tensor([5])
        advance_reference(sampled, slots, *wanted, stops, plain.flags, plain.counts, counter, ring)
        report = update_in_torch(sampled, slots, *state, stops)
        assert all(torch.equal(found, right) for found, right in zip(state, wanted, strict=True))
        assert torch.equal(report, ring[1, :9])
        updating_twice(advance_reference)(
            sampled, slots, *twice, stops, plain.flags, plain.counts, torch.tensor([5]), ring.clone()
        )
        assert all(torch.equal(found, right) for found, right in zip(twice, wanted, strict=True))


def test_sampling():
    """Greedy rows take the same token; drawn ones only what the reference keeps, and all of that sooner or later."""
    torch.manual_seed(1)
    logits = torch.randn(4, 50) * 2
    slots, rows = torch.tensor([3, 0, 2, 1]).int(), torch.arange(4).int()
    temperature = torch.tensor([0.0, 1.0, 2.0, 0.5])
    top_k, top_p = torch.tensor([0, 5, 0, 7]).int(), torch.tensor([1.0, 1.0, 0.6, 0.8])
    state = plain_sampling(4, "cpu", temperature=temperature, top_k=top_k, top_p=top_p, seeds=range(4))
    out, wanted = torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    sample_tokens_reference(logits, slots, rows, state, wanted)
    kept = ~scores_reference(logits, slots, rows, state).isnan()
    seen = torch.zeros_like(kept)
    for _ in range(3000):
        sample_in_torch(logits, slots, rows, state, out)
        assert out[1] == wanted[1]
        seen[torch.arange(4), out.long()] = True
    drawn = temperature[slots.long()] > 0
    assert not (seen & ~kept)[drawn].any()
    likely = (logits / temperature[slots.long()][:, None].clamp(min=1e-6)).softmax(-1) > 0.01
    assert seen[drawn][(kept & likely)[drawn]].all()
