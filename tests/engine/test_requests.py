"""What a request may be, what is refused by name, and that it is a copy; the engine and the decode loop alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.decode import by_slot, prefill
from helpers.llama import open_cache

from vattn import Engine, Request, Sampling
from vattn.decode import DecodeLoop
from vattn.errors import ConfigError
from vattn.models import FusedLlama, Llama
from vattn.requests import checked_request


@pytest.fixture
def engine(model: Llama) -> Iterator[Engine]:
    with open_cache(model, 4) as cache:
        with Engine(model, cache) as engine:
            yield engine
        assert cache.stats().num_live_slots == 0


class Id:
    def __index__(self) -> int:
        return 3


@pytest.mark.parametrize(
    "prompt",
    [
        (1, 2, 3),
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        np.array([1, 2, 3], np.int8),
        np.array([1, 2, 3], np.uint64),
        list(np.array([1, 2, 3])),
        list(torch.tensor([1, 2, 3])),
        [1, np.uint8(2), Id()],
        range(1, 4),
        (token for token in (1, 2, 3)),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_whatever_holds_integers_is_token_ids(engine: Engine, prompt: object) -> None:
    expected = engine.generate([Request([1, 2, 3], 5)])[0].tokens
    assert engine.generate([Request(prompt, 5)])[0].tokens == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [tuple, list, set, frozenset, iter, np.array, torch.tensor])
def test_whatever_holds_integers_is_stop_tokens(engine: Engine, kind: object) -> None:
    tokens = engine.generate([Request([1, 2, 3], 20)])[0].tokens
    stop_tokens = kind([tokens[7], tokens[12]])  # type: ignore[operator]
    stopped = engine.generate([Request([1, 2, 3], 20, stop_tokens=stop_tokens)])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == tokens[: tokens.index(stopped.tokens[-1]) + 1]
    assert stopped.tokens[-1] in (tokens[7], tokens[12])


def test_values_become_plain_ones() -> None:
    sampling = Sampling(
        np.float32(0.5),  # type: ignore[arg-type]
        np.uint8(9),  # type: ignore[arg-type]
        np.float64(0.25),
        seed=torch.tensor(7),  # type: ignore[arg-type]
        logit_bias={np.int64(3): np.float32(2.0)},  # type: ignore[dict-item]
        min_new_tokens=np.int16(2),  # type: ignore[arg-type]
    )
    request = checked_request(
        Request(
            np.arange(3),  # type: ignore[arg-type]
            np.int8(100),  # type: ignore[arg-type]
            sampling,
            [np.int8(5), 5, 6],  # type: ignore[list-item]
            np.uint8(2),  # type: ignore[arg-type]
            torch.tensor(3),  # type: ignore[arg-type]
            np.int8(-1),  # type: ignore[arg-type]
            np.float32(1.5),  # type: ignore[arg-type]
        ),
        vocab_size=128,
    )
    plain = Sampling(0.5, 9, 0.25, seed=7, logit_bias={3: 2.0}, min_new_tokens=2)
    assert request == Request((0, 1, 2), 100, plain, (5, 6), 2, 3, -1, 1.5)
    values = (request.max_new_tokens, request.n, request.priority, *request.prompt_tokens, *request.stop_tokens)
    assert {type(value) for value in values} == {int}
    chosen = request.sampling
    assert chosen is not None
    assert {type(each) for each in (chosen.seed, chosen.top_k, chosen.min_new_tokens, *chosen.logit_bias)} == {int}
    assert {type(each) for each in (chosen.temperature, chosen.top_p, *chosen.logit_bias.values())} == {float}


def test_small_integers_do_not_overflow(engine: Engine) -> None:
    """100 + 100 is beyond an int8."""
    completion = engine.generate([Request([3] * 100, np.int8(100))])[0]  # type: ignore[arg-type]
    assert len(completion.tokens) == 100


class Raises:
    def __index__(self) -> int:
        raise RuntimeError("no number today")

    def __repr__(self) -> str:
        raise RuntimeError("nor a text")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_tokens": "Hello"}, "prompt_tokens must be token ids.*tokenizer.*'Hello'"),
        ({"prompt_tokens": b"Hello"}, "prompt_tokens must be token ids"),
        ({"prompt_tokens": None}, "prompt_tokens must be token ids.*None"),
        ({"prompt_tokens": 5}, "prompt_tokens must be token ids"),
        ({"prompt_tokens": {1, 2}}, "order"),
        ({"prompt_tokens": torch.tensor([[1, 2]])}, r"shape \(1, 2\)"),
        ({"prompt_tokens": np.array(1)}, r"shape \(\)"),
        ({"prompt_tokens": torch.tensor([1.0])}, "got 1.0 among them, a float"),
        ({"prompt_tokens": torch.tensor([True])}, "got True among them"),
        ({"prompt_tokens": [torch.tensor(True)]}, "must be token ids"),
        ({"prompt_tokens": [np.True_]}, "must be token ids"),
        ({"prompt_tokens": [1, True]}, "got True among them"),
        ({"prompt_tokens": [[1]]}, "must be token ids"),
        ({"prompt_tokens": [128]}, "128 is not in"),
        ({"prompt_tokens": [-1]}, "-1 is not in"),
        ({"prompt_tokens": []}, "empty"),
        ({"prompt_tokens": np.array([])}, "empty"),
        ({"stop_tokens": None}, "stop_tokens must be token ids.*None"),
        ({"stop_tokens": 5}, "stop_tokens must be token ids.*5"),
        ({"stop_tokens": "</s>"}, "stop_tokens must be token ids.*tokenizer"),
        ({"stop_tokens": ["</s>"]}, "stop_tokens must be token ids, .* got '</s>' among them"),
        ({"stop_tokens": [128]}, "stop_tokens: 128 is not in"),
        ({"stop_tokens": [False]}, "stop_tokens must be .* got False"),
        ({"stop_tokens": [2.0]}, "stop_tokens must be .* got 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 5.0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"max_new_tokens": None}, "max_new_tokens"),
        ({"n": 0}, "n must be"),
        ({"n": True}, "n must be"),
        ({"n": 1025}, "n must be"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens"),
        ({"max_new_tokens": Raises()}, "max_new_tokens .* got a Raises"),
        ({"stop_tokens": (1 // 0 for _ in range(1))}, "stop_tokens .* raised ZeroDivisionError"),
        ({"num_logprobs": -1}, "num_logprobs"),
        ({"num_logprobs": 21}, "num_logprobs"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"allowed_tokens": [1]}, "allowed_tokens"),
        ({"sampling": {"temperature": 1}}, "sampling must be"),
    ],
)
def test_wrong_values_are_refused_by_submit(engine: Engine, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request(**{"prompt_tokens": [1], **values}))  # type: ignore[arg-type]
    assert not engine.has_work


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_k": 1.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": True}, "seed"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"logit_bias": [5]}, "logit_bias must map"),
        ({"logit_bias": {128: 1.0}}, "logit_bias: 128 is not in"),
        ({"logit_bias": {torch.tensor(5): 1.0, torch.tensor(5): 2.0}}, "names a token twice"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias of token 5"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 129}, "min_new_tokens 129 exceeds"),
    ],
)
def test_wrong_sampling_is_refused_by_submit(engine: Engine, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request([1], sampling=Sampling(**values)))
    assert not engine.has_work


@pytest.mark.parametrize("request_", ["Hello", [1, 2, 3], None, Request])
def test_what_is_no_request_is_refused(engine: Engine, request_: object) -> None:
    with pytest.raises(ConfigError, match="expected a Request"):
        engine.submit(request_)  # type: ignore[arg-type]


def test_a_submitted_request_is_a_copy(engine: Engine) -> None:
    """Its caller goes on with its list: a chat's history, to which each new token is appended."""
    expected = engine.generate([Request([1, 2, 3], 5)])[0].tokens
    for kind in (list, np.array, torch.tensor):
        history, stop_tokens = kind([1, 2, 3]), {127}
        engine.submit(Request(history, 5, stop_tokens=stop_tokens))  # type: ignore[arg-type]
        if kind is not list:
            history[:] = 77
        tokens: list[int] = []
        while engine.has_work:
            for new in engine.step():
                tokens.append(new.token)
                stop_tokens.update(range(128))
                if kind is list:
                    history.append(new.token)
        assert tuple(tokens) == expected


def test_a_started_sequence_is_a_copy(model: Llama) -> None:
    """The decode loop's ``start``: integers of any kind, and what is given may change later."""
    with open_cache(model, 3) as cache, DecodeLoop(FusedLlama(model), cache) as loop:
        slot = prefill(model, cache, [1, 2, 3])
        loop.start(slot, 3, 20)
        tokens = by_slot(loop.run())[slot]
        cache.truncate(slot, 2)
        stop = np.array([tokens[9]])
        loop.start(torch.tensor(slot), torch.tensor(3), np.int8(20), Sampling(top_k=np.int8(1)), stop)  # type: ignore[arg-type]
        stop[:] = tokens[0]
        assert by_slot(loop.run())[slot] == tokens[: tokens.index(tokens[9]) + 1]
        cache.truncate(slot, 2)
        for stop_tokens in (5, "</s>", ["</s>"], [True]):
            with pytest.raises(ConfigError, match="stop_tokens"):
                loop.start(slot, 3, 20, None, stop_tokens)  # type: ignore[arg-type]
        loop.start(slot, 3, 20, None, (token for token in (tokens[9],)))  # type: ignore[arg-type]
        assert by_slot(loop.run())[slot] == tokens[: tokens.index(tokens[9]) + 1]


@pytest.mark.parametrize("values", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}, {"temperature": 0}])
def test_the_same_tokens_from_the_engine_and_from_the_decode_loop(
    model: Llama, engine: Engine, values: dict[str, float]
) -> None:
    sampling = Sampling(**{"temperature": 1.5, "seed": 11, **values})  # type: ignore[arg-type]
    request = Request([1, 2, 3], 40, sampling)
    with open_cache(model, 3) as cache, DecodeLoop(FusedLlama(model), cache) as loop:
        slot = prefill(model, cache, [1, 2, 3])
        loop.start(slot, 3, 40, sampling)
        assert tuple(by_slot(loop.run())[slot]) == engine.generate([request])[0].tokens


def test_temperatures_that_float32_rounds_to_zero_are_greedy(engine: Engine) -> None:
    greedy = engine.generate([Request([1, 2, 3], 20)])[0].tokens
    assert engine.generate([Request([1, 2, 3], 20, Sampling(1e-46))])[0].tokens == greedy
    assert engine.generate([Request([1, 2, 3], 20, Sampling(2.0, top_k=1))])[0].tokens == greedy
    assert engine.generate([Request([1, 2, 3], 20, Sampling(2.0))])[0].tokens != greedy


def test_what_is_no_list_of_requests_and_no_cache(engine: Engine, model: Llama) -> None:
    with pytest.raises(ConfigError, match="list of requests"):
        engine.generate(Request([1]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"a str as cache"):
        Engine(model, "cpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown attention"):
        Engine(model, engine.cache, attention="nonesuch")
    with Engine(model, engine.cache, attention="sdpa") as other:
        assert other.attention.name == "sdpa"
    with pytest.raises(ConfigError, match="token ids"):
        engine.submit(Request({1: 2}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt", [torch.empty(3, dtype=torch.int64, device="meta"), torch.eye(2).to_sparse()[0], [Raises()]]
)
def test_what_raises_when_it_is_read_is_refused(engine: Engine, prompt: object) -> None:
    with pytest.raises(ConfigError, match="prompt_tokens"):
        engine.submit(Request(prompt))  # type: ignore[arg-type]


def test_no_more_log_probabilities_than_tokens(model: Llama) -> None:
    """Refused by ``submit``, not by the step that starts it beside others."""
    tiny = Llama.random(replace(model.config, vocab_size=10))
    with Engine(tiny, memory_limit=1 << 24) as engine:
        with pytest.raises(ConfigError, match=r"num_logprobs must be .* at most 10"):
            engine.submit(Request([1], num_logprobs=15))
        (completion,) = engine.generate([Request([1], 2, num_logprobs=10)])
        assert [len(top) for top in completion.top_logprobs] == [10, 10]
