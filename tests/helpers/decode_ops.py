"""What a captured decode step finds by slot, for tests of its ops."""

from __future__ import annotations

import torch

from vattn.ops.sample_tokens import sample_tokens, sample_tokens_reference, scores_reference
from vattn.ops.sampling import sample_tokens_eager

INF, NAN = float("inf"), float("nan")


def listed_slots(num_slots, batch, num_padding):
    """Slots in random order, and a scratch slot that every row of padding repeats."""
    order = torch.randperm(num_slots)
    return torch.cat((order[:batch], order[-1:].repeat(num_padding))).int()


class Requests:
    """Parameters by slot, one request for each of ``rows``; with a slot more than there are requests."""

    def __init__(self, device, temperature, top_k, top_p, seeds=None):
        count = max(len(each) for each in (temperature, top_k, top_p))
        self.slots = listed_slots(count + 1, count, 0).to(device)
        self.rows = torch.randint(0, 1 << 20, (count,), dtype=torch.int32, device=device)
        index = self.slots.long()

        def by_slot(values, dtype, spare):
            out = torch.full((count + 1,), spare, dtype=dtype, device=device)
            out[index] = torch.tensor(values, dtype=dtype, device=device).expand(count)
            return out

        self.temperature = by_slot(temperature, torch.float32, NAN)
        self.top_k = by_slot(top_k, torch.int32, -1)
        self.top_p = by_slot(top_p, torch.float32, NAN)
        if seeds is None:
            seeds = torch.randint(-(2**63), 2**63 - 1, (count,)).tolist()
        self.seeds = by_slot(seeds, torch.int64, 0)

    @property
    def arguments(self):
        return self.slots, self.rows, self.temperature, self.top_k, self.top_p, self.seeds

    def sample(self, logits, function=sample_tokens):
        out = torch.full((len(self.slots) + 2,), -7, dtype=torch.int32, device=logits.device)
        function(logits, *self.arguments, out[: len(self.slots)])
        assert (out[len(self.slots) :] == -7).all()
        out = out[: len(self.slots)]
        assert ((out >= 0) & (out < logits.shape[1])).all()
        return out

    def check(self, logits):
        """The kernel takes what the reference does, but where float32 cannot tell two scores apart; the host does."""
        taken, expected = self.sample(logits), self.sample(logits, sample_tokens_reference)
        assert torch.equal(self.sample(logits, sample_tokens_eager), expected)
        if not torch.equal(taken, expected):
            scores = scores_reference(logits, *self.arguments)
            score, best = (scores.gather(-1, ids.long()[:, None])[:, 0] for ids in (taken, expected))
            near = best - score <= 1e-5 * best.abs().clamp(min=1)
            assert ((taken == expected) | near).all(), (taken, expected, score, best)
        return taken
