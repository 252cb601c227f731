"""What a captured decode step finds by slot, for tests of its ops."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from vattn.ops.host_sampling import sample_tokens_eager
from vattn.ops.process_logits import SamplerState
from vattn.ops.sample_tokens import sample_tokens, sample_tokens_reference, scores_reference

INF, NAN = float("inf"), float("nan")

FIELDS = [field.name for field in fields(SamplerState)]
# What slots have that nobody uses.
SPARE = {torch.float32: NAN, torch.int32: -1, torch.int64: 0, torch.int16: -1}


def plain_sampling(max_slots, device, vocab=1, **given):
    """Greedy everywhere, and nothing else asked for, but what is given: a value for all slots, or one for each."""

    def each(name, value, dtype, *shape):
        value = torch.as_tensor(given.pop(name, value), dtype=dtype, device=device)
        return value.expand(max_slots, *shape).contiguous()

    state = SamplerState(
        temperature=each("temperature", 0, torch.float32),
        top_k=each("top_k", 0, torch.int32),
        top_p=each("top_p", 1, torch.float32),
        reach=each("reach", INF, torch.float32),
        seeds=each("seeds", 0, torch.int64),
        flags=each("flags", 0, torch.int32),
        repetition=each("repetition", 1, torch.float32),
        presence=each("presence", 0, torch.float32),
        frequency=each("frequency", 0, torch.float32),
        counts=each("counts", 0, torch.int16, vocab),
        bias_ids=each("bias_ids", -1, torch.int32, 3),
        bias_values=each("bias_values", 0, torch.float32, 3),
        allowed=each("allowed", 0, torch.int32, -(-vocab // 32)),
        stop_tokens=each("stop_tokens", -1, torch.int32, 2),
        min_rows=each("min_rows", 0, torch.int32),
    )
    assert not given
    return state


def listed_slots(num_slots, batch, num_padding):
    """Slots in random order, and a scratch slot that every row of padding repeats."""
    order = torch.randperm(num_slots)
    return torch.cat((order[:batch], order[-1:].repeat(num_padding))).int()


class Requests:
    """Parameters by slot, one request for each of ``rows``; with a slot more than there are requests."""

    def __init__(self, device, temperature, top_k, top_p, seeds=None, **more):
        count = max(len(each) for each in (temperature, top_k, top_p, *more.values()))
        self.slots = listed_slots(count + 1, count, 0).to(device)
        self.rows = torch.randint(0, 1 << 20, (count,), dtype=torch.int32, device=device)
        index = self.slots.long()

        def by_slot(values, like):
            values = torch.as_tensor(values, dtype=like.dtype, device=device)
            out = torch.full((count + 1, *values.shape[1:]), SPARE[like.dtype], dtype=like.dtype, device=device)
            out[index] = values.expand(count, *values.shape[1:])
            return out

        if seeds is None:
            seeds = torch.randint(-(2**63), 2**63 - 1, (count,)).tolist()
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seeds": seeds, **more}
        plain = plain_sampling(1, device)
        self.state = replace(
            plain, **{name: by_slot(given.get(name, getattr(plain, name)), getattr(plain, name)) for name in FIELDS}
        )

    @property
    def arguments(self):
        return self.slots, self.rows, self.state

    def sample(self, logits, function=sample_tokens):
        out = torch.full((len(self.slots) + 2,), -7, dtype=torch.int32, device=logits.device)
        function(logits, *self.arguments, out[: len(self.slots)])
        assert (out[len(self.slots) :] == -7).all()
        out = out[: len(self.slots)]
        assert ((out >= -1) & (out < logits.shape[1])).all()
        if not self.state.flags.any():  # all tokens may come
            assert torch.equal(out < 0, logits.isnan().all(-1))
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
