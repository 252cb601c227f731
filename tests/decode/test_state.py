"""What sequences start with, and what is kept of it for each slot."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vattn import ConfigError
from vattn.decode.state import DecodeState, Start, checked_mask
from vattn.ops.process_logits import ALLOWED, BIAS, IN_PROMPT, PENALTIES, STOPS
from vattn.requests import Sampling

VOCAB = 70
PLAIN = Start(2, 5, 10)


def checked(start):
    return start.checked(vocab_size=VOCAB, max_stop_tokens=4)


def state_of(device, *starts, rows=None):
    state = DecodeState(6, 4, VOCAB, torch.device(device))
    begin(state, *starts, rows=rows)
    return state


def begin(state, *starts, rows=None):
    upload = lambda array: torch.from_numpy(array).to(state.tokens.device)  # noqa: E731
    state.start(upload, [checked(start) for start in starts], rows or [7] * len(starts))
    state.upload_allowed(upload)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": -1}, "slot must be"),
        ({"token": VOCAB}, "token: 70 is not in"),
        ({"token": "a"}, "token must be token ids"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"sampling": 0.5}, "sampling must be"),
        ({"sampling": Sampling(logit_bias={VOCAB: 1.0})}, "logit_bias: 70 is not in"),
        ({"stop_tokens": range(5)}, "5 stop tokens exceed 4"),
        ({"stop_tokens": 5}, "stop_tokens must be"),
        ({"answer_tokens": [1, VOCAB]}, "answer_tokens: 70 is not in"),
        ({"answer_tokens": [1, -1]}, "answer_tokens: -1 is not in"),
        ({"answer_tokens": [1.5]}, "answer_tokens must be token ids"),
        ({"answer_tokens": 5}, "answer_tokens must be token ids"),
        ({"answer_tokens": [[1], [2, 3]]}, "answer_tokens must be token ids"),
        ({"answer_tokens": np.ones((2, 2), int)}, "answer_tokens must be token ids"),
        ({"prompt_tokens": "text", "sampling": Sampling(presence_penalty=1.0)}, "prompt_tokens must be token ids"),
        ({"num_logprobs": 21}, "num_logprobs must be"),
        ({"num_logprobs": True}, "num_logprobs must be"),
    ],
)
def test_what_cannot_start(change, message):
    with pytest.raises(ConfigError, match=message):
        checked(replace(PLAIN, **change))


def test_plain_values_of_any_integers():
    given = [3, 4, 4]
    start = checked(
        Start(
            np.int8(2),
            torch.tensor(5),
            np.int64(10),
            Sampling(frequency_penalty=1),
            {7, 8},
            torch.tensor([1, 2]),
            given,
            np.int32(3),
        )
    )
    given.append(9)
    assert (start.slot, start.token, start.max_new_tokens, start.num_logprobs) == (2, 5, 10, 3)
    assert sorted(start.stop_tokens) == [7, 8]
    assert start.prompt_tokens.tolist() == [1, 2]
    assert start.answer_tokens.tolist() == [3, 4, 4]
    assert checked(replace(PLAIN, stop_tokens=[5, 5, 5, 5, 5])).stop_tokens == (5,)
    assert checked(replace(PLAIN, prompt_tokens=object())).prompt_tokens.size == 0  # nothing looks at it


def test_small_vocabularies_have_few_likeliest():
    with pytest.raises(ConfigError, match="at most 3"):
        replace(PLAIN, token=1, num_logprobs=4).checked(vocab_size=3, max_stop_tokens=4)


def test_what_a_slot_has(device):
    how = Sampling(
        temperature=0.5, top_k=3, top_p=0.9, min_p=0.2, seed=2**63 - 1, repetition_penalty=1.5, min_new_tokens=6
    )
    bias = Sampling(logit_bias={8: 1.5, 9: -math.inf}, presence_penalty=0.25, frequency_penalty=-0.5)
    state = state_of(
        device,
        Start(4, 5, 10, how, (1, 2), prompt_tokens=[3, 3, 4], answer_tokens=[4, 6, 6, 5], num_logprobs=2),
        Start(1, 6, 20, bias, ()),
        Start(0, 7, 30),
        rows=[6, 2, 0],
    )
    sampler, order = state.sampler, [4, 1, 0]
    assert state.tokens[order].tolist() == [5, 6, 7]
    assert state.lengths[order].tolist() == [6, 2, 0]
    assert state.remaining[order].tolist() == [10, 20, 30]
    assert sampler.flags[order].tolist() == [PENALTIES | STOPS, PENALTIES | BIAS, 0]
    assert sampler.min_rows[order[0]] == 8  # the answer has 4 of 6, and the next comes from row 6
    assert sampler.temperature[order].tolist() == [0.5, 0, 0]
    assert sampler.top_k[order].tolist() == [3, 0, 0]
    assert sampler.top_p[order].tolist() == pytest.approx([0.9, 1, 1])
    assert sampler.reach[order].tolist() == pytest.approx([-0.5 * math.log(0.2), math.inf, math.inf])
    assert sampler.seeds[order].tolist() == [2**63 - 1, 0, 0]
    assert sampler.repetition[order].tolist() == [1.5, 1, 1]
    assert sampler.presence[order].tolist() == [0, 0.25, 0]
    assert sampler.frequency[order].tolist() == [0, -0.5, 0]
    assert sampler.stop_tokens[order].tolist() == [[1, 2, -1, -1], [-1] * 4, [-1] * 4]
    assert {token: count for token, count in enumerate(sampler.counts[4].tolist()) if count} == {
        3: IN_PROMPT,
        4: IN_PROMPT + 1,
        5: 1,
        6: 2,
    }
    assert sampler.bias_ids[1, :3].tolist() == [8, 9, -1]
    assert sampler.bias_values[1, :2].tolist() == [1.5, -math.inf]
    assert state.num_logprobs == {4: 2}
    # Another kind of sequence in the same slot.
    begin(state, Start(4, 9, 1, Sampling(frequency_penalty=1.0), answer_tokens=[9]))
    assert sampler.counts[4].nonzero().tolist() == [[9]]
    assert sampler.flags[4] == PENALTIES
    assert state.num_logprobs == {}


def test_what_a_slot_takes(device):
    state = DecodeState(7, 16, 1000, torch.device(device))
    tensors = [*vars(state).values(), *vars(state.sampler).values()]
    storages = [each.untyped_storage() for each in tensors if isinstance(each, torch.Tensor)]
    taken = {each.data_ptr(): each.nbytes() for each in storages}
    assert sum(taken.values()) == 7 * DecodeState.bytes_per_slot(16, 1000)


def test_counts_end_where_their_bits_do(device):
    answer = [5] * 40_000
    state = state_of(device, Start(0, 5, 1, Sampling(presence_penalty=1.0), (), [5], answer))
    assert state.sampler.counts[0, 5] == IN_PROMPT + 0x7FFF


@pytest.mark.parametrize(
    ("sampling", "stops", "answer", "is_flagged"),
    [
        (Sampling(min_new_tokens=3), (1,), (), True),
        (Sampling(min_new_tokens=3), (), (), False),  # nothing to forbid
        (Sampling(min_new_tokens=3), (1,), (5, 5, 5), False),  # has them
        (Sampling(min_new_tokens=2**40), (1,), (), True),
    ],
)
def test_minimum_length_is_a_flag_only_while_it_forbids(sampling, stops, answer, is_flagged):
    state = state_of("cpu", Start(0, 5, 9, sampling, stops, (), answer))
    assert bool(state.sampler.flags[0] & STOPS) == is_flagged


def test_masks(device):
    """Any form of a mask; several go up together; what lies beyond the vocabulary does not count."""
    state = state_of(device, Start(0, 1, 2), Start(3, 1, 2, Sampling(presence_penalty=1.0)))
    allowed = np.zeros(VOCAB, bool)
    allowed[[0, 31, 32, 69]] = True
    words = np.array([1 - 2**31, 1, 32], np.int32)
    beyond = words | np.array([0, 0, -64], np.int32)
    forms = [allowed, torch.from_numpy(allowed), allowed.tolist(), words, torch.from_numpy(words), beyond]
    assert all(checked_mask(form, VOCAB).tolist() == words.tolist() for form in forms)
    with pytest.raises(ConfigError, match="allow nothing"):
        checked_mask(np.array([0, 0, -64], np.int32), VOCAB)

    upload = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    state.allow(0, allowed)
    state.allow(3, words)
    assert state.sampler.flags[[0, 3]].tolist() == [0, PENALTIES]
    state.upload_allowed(upload)
    assert state.sampler.flags[[0, 3]].tolist() == [ALLOWED, PENALTIES | ALLOWED]
    assert state.sampler.allowed[[0, 3]].tolist() == [words.tolist()] * 2
    state.allow(0, None)
    state.allow(3, np.arange(VOCAB) == 3)
    state.upload_allowed(upload)
    assert state.sampler.flags[[0, 3]].tolist() == [0, PENALTIES | ALLOWED]
    assert state.sampler.allowed[3].tolist() == [8, 0, 0]
