"""A decode step by itself: what requests ask of their tokens, against the model's logits and plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.llama import open_cache, random_tokens, run, small_model

from vattn import ConfigError
from vattn.decode.graphs import StepGraphs
from vattn.decode.state import DecodedToken, DecodeState, Start
from vattn.decode.step import RING, DecodeStep
from vattn.models import FusedLlama
from vattn.requests import Sampling

VOCAB = 128


class Bench:
    """A step over sequences with room for 60 tokens each; the last slot fills up batches."""

    def __init__(self, device: str) -> None:
        self.model = small_model().to(device)
        self.cache = open_cache(self.model, 6, max_seq_len=100)
        self.stream = torch.cuda.Stream(device) if device == "cuda" else None
        self.state = DecodeState(6, 16, VOCAB, self.cache.device)
        self.scratch = self.cache.acquire(5)
        self.cache.ensure(self.scratch, 1)
        self.step = DecodeStep(
            FusedLlama(self.model),
            self.cache,
            self.state,
            self.scratch,
            max_batch=5,
            attention=None,
            typical_len=32,
            max_seq_len=100,
            buckets=(2, 5),
            mode="never" if self.stream is None else "always",
            steps_per_launch=1,
            stream=self.stream,
        )

    def start(self, prompt: list[int], answer: tuple[int, ...] = (), num: int = 12, **how: object) -> int:
        """As the engine does it: all tokens but the last are in the cache."""
        slot, tokens = self.cache.acquire(), [*prompt, *answer]
        run(self.model, self.cache, [slot], [tokens[:-1]])
        rows = self.cache.seq_len(slot)
        self.cache.ensure(slot, rows + num + 1)  # steps past the end of a sequence write one row more
        start = Start(slot, tokens[-1], num, prompt_tokens=prompt, answer_tokens=answer, **how)  # type: ignore[arg-type]
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self.state.start(self.step.upload, [start.checked(vocab_size=VOCAB, max_stop_tokens=16)], [rows])
        return slot

    def tokens(
        self, slots: list[int], num: int = 12, allow: dict[int, object] | None = None
    ) -> list[list[DecodedToken]]:
        """Of each slot until it ends, one step launched ahead of the one that is read."""
        found: dict[int, list[DecodedToken]] = {slot: [] for slot in slots}
        under_way = []
        for _ in range(num):
            for slot, mask in (allow or {}).items():
                self.step.state.allow(slot, mask)
            with torch.inference_mode(), torch.cuda.stream(self.stream):
                under_way += self.step.launch(list(slots))
            if len(under_way) > 1:
                self._read(under_way.pop(0), found)
        for launched in under_way:
            self._read(launched, found)
        return list(found.values())

    def _read(self, launched: object, found: dict[int, list[DecodedToken]]) -> None:
        for token in self.step.read(launched):  # type: ignore[arg-type]
            if not (found[token.slot] and found[token.slot][-1].finish_reason):
                found[token.slot].append(token)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        self.step.release()
        self.cache.close()


@pytest.fixture
def bench(device: str) -> Iterator[Bench]:
    bench = Bench(device)
    yield bench
    bench.close()


def logits_after(model: object, tokens: list[int]) -> np.ndarray:
    with open_cache(model, 1, max_seq_len=100) as cache:  # type: ignore[arg-type]
        return run(model, cache, [cache.acquire()], [tokens])[0].double().numpy()  # type: ignore[arg-type]


def by_hand(
    model: object, prompt: list[int], num: int, how: Sampling, answer: tuple[int, ...] = (), stops=()
) -> list[int]:
    """Greedy, from the logits of the whole sequence so far."""
    tokens = list(answer)
    while len(tokens) < num:
        logits = logits_after(model, [*prompt, *tokens])
        for token, bias in how.logit_bias.items():
            logits[token] += bias
        for token in set(prompt) | set(tokens):
            logits[token] *= how.repetition_penalty if logits[token] < 0 else 1 / how.repetition_penalty
            logits[token] -= how.frequency_penalty * tokens.count(token) + how.presence_penalty * (token in tokens)
        if len(tokens) < how.min_new_tokens:
            logits[list(stops)] = -np.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stops:
            break
    return tokens


SETTINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.8),
    Sampling(presence_penalty=1.5, frequency_penalty=0.7),
    Sampling(repetition_penalty=0.8, frequency_penalty=1.3, logit_bias={3: 2.0, 90: -np.inf, 17: 4.5}),
    Sampling(logit_bias=dict.fromkeys(range(0, 128, 2), -5.0)),
]


def test_penalties_and_bias_count_what_was_said(bench):
    """Five requests of different kinds in one batch; tokens of the answer count from the step that chose them."""
    prompts = [random_tokens(3 + 4 * i, VOCAB, i) for i in range(5)]
    slots = [bench.start(prompt, sampling=how) for prompt, how in zip(prompts, SETTINGS, strict=True)]
    found = bench.tokens(slots)
    expected = [by_hand(bench.model, prompt, 12, how) for prompt, how in zip(prompts, SETTINGS, strict=True)]
    assert [[each.token for each in tokens] for tokens in found] == expected
    assert [tokens[-1].finish_reason for tokens in found] == ["length"] * 5
    plain = [by_hand(bench.model, prompt, 12, Sampling()) for prompt in prompts]
    assert sum(one != other for one, other in zip(expected, plain, strict=True)) == 4


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_sequence_that_goes_on_is_as_if_nothing_had_happened(bench, cut):
    """Also in a slot that another sequence with penalties had, and drawn tokens too."""
    prompt = random_tokens(9, VOCAB, 3)
    how = Sampling(temperature=1.2, top_p=0.9, seed=4, repetition_penalty=1.5, frequency_penalty=0.5, min_new_tokens=7)
    stops = by_hand(bench.model, prompt, 12, how)[:3]
    (whole,) = bench.tokens([slot := bench.start(prompt, sampling=how, stop_tokens=stops)])
    tokens = tuple(each.token for each in whole)
    bench.cache.release(slot)
    assert len(tokens) > 7
    cut = min(cut, len(tokens) - 1)
    num = 12 - cut
    again = bench.start(prompt, tokens[:cut], num, sampling=how, stop_tokens=stops)
    assert again == slot
    (rest,) = bench.tokens([again], num)
    assert tuple(each.token for each in rest) == tokens[cut:]
    assert rest[-1].finish_reason == whole[-1].finish_reason


def test_flags_of_the_sequence_before_are_gone(bench):
    prompt = random_tokens(9, VOCAB, 3)
    how = Sampling(repetition_penalty=3.0, logit_bias={1: 100.0}, min_new_tokens=12)
    slot = bench.start(prompt, sampling=how, stop_tokens=range(16), num_logprobs=2)
    bench.tokens([slot], allow={slot: np.arange(VOCAB) < 20})
    bench.step.state.allow(slot, np.arange(VOCAB) < 20)  # and one that no step has taken
    bench.cache.release(slot)
    assert bench.start(prompt) == slot
    (tokens,) = bench.tokens([slot])
    assert [each.token for each in tokens] == by_hand(bench.model, prompt, 12, Sampling())
    assert all(each.logprob is None for each in tokens)


def test_minimum_length(bench):
    prompt = random_tokens(9, VOCAB, 5)
    said = by_hand(bench.model, prompt, 12, Sampling())
    stops = (said[0], said[2], 77)
    how = Sampling(min_new_tokens=4)
    slots = [bench.start(prompt, sampling=how, stop_tokens=stops), bench.start(prompt, stop_tokens=stops)]
    late, early = bench.tokens(slots)
    expected = by_hand(bench.model, prompt, 12, how, stops=stops)
    assert [each.token for each in late] == expected
    assert not set(stops) & set(expected[:4])
    assert [(each.token, each.finish_reason) for each in early] == [(said[0], "stop")]


def test_logprobs(bench):
    """Of those that ask, as many as they ask for; of the model's own distribution, whatever is done to it."""
    prompts = [random_tokens(4 + i, VOCAB, i) for i in range(4)]
    how = [Sampling(), Sampling(temperature=1.5, top_k=3), Sampling(repetition_penalty=2.0, logit_bias={9: 50.0}), None]
    asked = [5, 0, 20, None]
    slots = [bench.start(p, sampling=h, num_logprobs=k) for p, h, k in zip(prompts, how, asked, strict=True)]
    found = bench.tokens(slots, 2 * RING, {slots[0]: np.arange(VOCAB) % 2 == 0})
    for prompt, k, tokens in zip(prompts, asked, found, strict=True):
        said = list(prompt)
        for each in tokens:
            if k is None:
                assert each.logprob is None
                assert each.top_logprobs == ()
            else:
                logits = logits_after(bench.model, said)
                logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
                assert each.logprob == pytest.approx(logs[each.token], abs=1e-4)
                likeliest = np.argsort(-logs, kind="stable")[:k].tolist()
                assert [token for token, _ in each.top_logprobs] == likeliest
                assert [log for _, log in each.top_logprobs] == pytest.approx(logs[likeliest].tolist(), abs=1e-4)
            said.append(each.token)
        assert len(tokens) == 12


def test_masks(bench):
    """A new one for every step of one sequence, one that stays for another, and none for the third."""
    prompt = random_tokens(9, VOCAB, 8)
    slots = [bench.start(prompt) for _ in range(3)]
    masks = [np.random.default_rng(i).random(VOCAB) < 0.05 for i in range(4)]
    bench.step.state.allow(slots[1], torch.from_numpy(masks[3]))
    said: list[list[int]] = [[], [], []]
    for step in range(3):
        words = np.packbits(masks[step], bitorder="little").view(np.int32)
        for i, tokens in enumerate(bench.tokens(slots, 1, {slots[0]: words})):
            said[i].append(tokens[0].token)
    tokens = []
    for mask in masks[:3]:
        tokens.append(int(np.where(mask, logits_after(bench.model, [*prompt, *tokens]), -np.inf).argmax()))
    assert said[0] == tokens
    assert masks[3][said[1]].all()
    assert said[2] == by_hand(bench.model, prompt, 3, Sampling())
    (rest,) = bench.tokens([slots[0]], 3, {slots[0]: None})
    assert [each.token for each in rest] == by_hand(bench.model, prompt, 6, Sampling(), tuple(tokens))[3:]


def test_a_sequence_of_which_no_token_may_come_ends(bench):
    """A stop token that is all that a mask allows, before the minimum length; the others go on."""
    prompt = random_tokens(9, VOCAB, 8)
    slots = [bench.start(prompt, sampling=Sampling(min_new_tokens=3), stop_tokens=[40]), bench.start(prompt)]
    ended, other = bench.tokens(slots, 3, {slots[0]: np.arange(VOCAB) == 40})
    assert ended == [DecodedToken(slots[0], None, "error")]
    assert [each.token for each in other] == by_hand(bench.model, prompt, 3, Sampling())
    assert bench.state.remaining[slots[0]] == 0


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros(VOCAB, bool),
        np.zeros(4, np.int32),
        np.ones(VOCAB - 1, bool),
        np.ones(VOCAB, np.int32),
        np.ones(4, np.int64),
        np.ones((1, VOCAB), bool),
        [1, 2, 3],
        "all",
        object(),
        {5},
    ],
)
def test_masks_that_are_none(bench, mask):
    with pytest.raises(ConfigError, match="allowed tokens"):
        bench.step.state.allow(0, mask)


def test_captures_that_fail_are_no_steps(bench, monkeypatch):
    """What ran on the device before something failed does not count: later steps are read where they are written."""

    class Beside:
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def fit(self, batch: int) -> str:
            if self.fails:
                raise MemoryError
            return "all"

        def __call__(self, residual, batch, attention):
            return bench.step.model.decode(residual, batch, bench.cache, attention)

    if bench.stream is None:
        bench.step._graphs.mode = "always"
        monkeypatch.setattr(StepGraphs, "_captured", lambda graphs, run: run())
    prompt = random_tokens(9, VOCAB)
    expected = by_hand(bench.model, prompt, 12, Sampling())
    slot = bench.start(prompt)
    found = bench.tokens([slot], 3)[0]
    with pytest.raises(MemoryError), torch.inference_mode(), torch.cuda.stream(bench.stream):
        bench.step.capture_beside(lambda rows: [Beside(False), Beside(True)])
    with pytest.raises(ConfigError, match="no logits"):
        bench.step.logits()
    assert [each.token for each in found + bench.tokens([slot], 9)[0]] == expected
