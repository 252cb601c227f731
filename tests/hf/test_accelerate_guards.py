"""``accelerate``: what the model is left as, arguments it refuses, and what is raised on the way."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.helpers.accelerated import generate, works
from tests.helpers.hf_models import make_model, prompt, with_cache
from vattn import ConfigError, OutOfPages
from vattn.hf import accelerate


# -- what the model is left as ----------------------------------------------------------------------------------------
def test_restore_leaves_nothing(model: PreTrainedModel) -> None:
    before, forward = dict(vars(model)), model.forward
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    logits, tokens = model(prompt(2)).logits, generate(model)
    fast = accelerate(model, 64)
    generate(model)
    assert "forward" in vars(model)
    fast.restore()
    fast.restore()
    assert dict(vars(model)).keys() == before.keys()
    assert model.forward == forward
    assert model.config.to_dict() == config
    assert torch.equal(model(prompt(2)).logits, logits)
    assert torch.equal(generate(model), tokens)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_end_of_a_block_restores(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="typo"), accelerate(model, 64):
        generate(model, typo=generate(model))
    assert "generate" not in vars(model)


def test_a_forward_of_the_users_own_comes_back(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(model).forward(model, *args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]
    with accelerate(model, 64) as fast:
        works(fast, plain)
    assert model.forward is forward
    assert calls


def test_what_was_put_around_stays(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    fast = accelerate(model, 64)
    inner = model.generate
    model.generate = lambda *args, **options: inner(*args, **options)  # type: ignore[method-assign]
    around = model.generate
    assert generate(model).tolist() == generate(plain).tolist()
    fast.restore()
    assert model.generate is around
    assert generate(model).tolist() == generate(plain).tolist()


def test_a_copy_is_not_accelerated(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64) as fast:
        works(fast, plain)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for each in model.parameters():
                each.zero_()
        assert generate(other).tolist() == generate(plain).tolist()
        with pytest.raises(ConfigError, match="restore"):
            pickle.dumps(model)


def test_calls_of_the_model_itself_are_its_own(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64) as fast:
        works(fast, plain)
        mine, other = DynamicCache(), DynamicCache()
        for tokens in (prompt(2), prompt(2, seed=4, length=1)):
            got, want = model(tokens, **with_cache(mine)), plain(tokens, **with_cache(other))
            torch.testing.assert_close(got.logits, want.logits)
        assert model(prompt(2)).logits.shape == (2, 11, 97)


def test_attention_that_is_changed_meanwhile_is_the_models(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64) as fast:
        works(fast, plain)
        assert model.config._attn_implementation == plain.config._attn_implementation
        model.set_attn_implementation("eager")
        works(fast, plain)
        assert model(prompt(2), output_attentions=True).attentions[0].shape == (2, 4, 11, 11)
    assert model.config._attn_implementation == "eager"


@pytest.mark.slow
def test_transformers_continuous_batching_runs_beside(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    inputs = [prompt(1, seed=seed, length=5)[0].tolist() for seed in range(2)]

    def tokens(of: PreTrainedModel) -> list[list[int]]:
        return [each.generated_tokens for each in of.generate_batch(inputs, max_new_tokens=4).values()]

    wanted = tokens(plain)
    plain.set_attn_implementation("sdpa")
    with accelerate(model, 64) as fast:
        works(fast, plain)
        assert tokens(model) == wanted
        works(fast, plain)


# -- wrong arguments --------------------------------------------------------------------------------------------------
def test_twice_is_refused(model: PreTrainedModel) -> None:
    with accelerate(model, 64), pytest.raises(ConfigError, match="accelerated already"):
        accelerate(model)
    accelerate(model, 64).restore()


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ConfigError, match="encoder-decoder"):
        accelerate(t5)
    assert "forward" not in vars(t5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": "many"}, "max_batch"),
        ({"max_batch": 10**9}, r"max_batch=1000000000 takes \d{13} bytes"),
        ({"memory_limit": -1}, "memory_limit"),
        ({"memory_limit": 1000}, "memory_limit must be at least 2097152 bytes.* got 1000"),
        ({"memory_limit": 2**21 - 1}, "memory_limit must be at least 2097152 bytes.* got 2097151"),
        ({"fuse": "no"}, "fuse must be True or False, got 'no'"),
        ({"run_ahead": 1}, "run_ahead must be True or False"),
    ],
)
def test_arguments_are_checked(model: PreTrainedModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accelerate(model, **arguments)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(("name", "num_pages"), [("Llama", 1), ("Gemma 3", 2)])
def test_the_least_memory_is_enough_for_a_sequence(name: str, num_pages: int) -> None:
    """A page for layers with a window, and one for those without."""
    model, least = make_model(name), num_pages * 2**21
    wanted = generate(model, prompt(1)).tolist()
    with pytest.raises(ConfigError, match=f"at least {least} bytes"):
        accelerate(model, 64, memory_limit=least - 1)
    with accelerate(model, 64, memory_limit=least) as fast:
        assert generate(model, prompt(1)).tolist() == wanted
        assert fast.reasons == []


def test_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear"):
        accelerate(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_model_without_its_head_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"a LlamaModel, which has no head .* AutoModelForCausalLM"):
        accelerate(model.model)


def test_wrong_options_are_transformers_to_refuse(model: PreTrainedModel) -> None:
    with accelerate(model, 64) as fast:
        with pytest.raises(ValueError, match="typo"):
            generate(model, typo=3)
        with pytest.raises(ValueError, match="temperature"):
            generate(model, do_sample=True, temperature=-1.0)
        works(fast, make_model("Llama"))


# -- when something is raised, and threads ----------------------------------------------------------------------------
class Broken(Exception):
    pass


class BrokenStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.num_put = 0

    def put(self, value: Any) -> None:
        self.num_put += 1
        if self.num_put > 3:
            raise Broken

    def end(self) -> None:
        pass


def broken(tokens: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
    if tokens.shape[1] > 13:
        raise Broken
    return scores


def broken_criterion(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    if tokens.shape[1] > 13:
        raise KeyboardInterrupt
    return torch.zeros(len(tokens), dtype=torch.bool)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        lambda: {"logits_processor": LogitsProcessorList([broken])},
        lambda: {"logits_processor": LogitsProcessorList([broken]), "num_beams": 3},
        lambda: {"stopping_criteria": StoppingCriteriaList([broken_criterion])},
        lambda: {"inputs": prompt(1), "streamer": BrokenStreamer()},
    ],
    ids=["processor", "processor of beams", "criterion", "streamer"],
)
def test_what_is_raised_on_the_way_leaves_everything_in_order(
    model: PreTrainedModel, plain: PreTrainedModel, options: Callable[[], dict[str, Any]], ahead: bool
) -> None:
    with accelerate(model, 64, run_ahead=ahead) as fast:
        for _ in range(3):
            given = options()
            inputs = given.pop("inputs", prompt(2))
            with pytest.raises((Broken, KeyboardInterrupt)):
                generate(model, inputs, **given)
        works(fast, plain)


def test_no_memory_is_told_and_leaves_everything_in_order(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 512, memory_limit=4 * 2**20) as fast:
        with pytest.raises(OutOfPages):
            generate(model, prompt(8, length=400))
        works(fast, plain)


@pytest.mark.parametrize("ahead", [False, True])
def test_logits_that_are_no_numbers(model: PreTrainedModel, ahead: bool) -> None:
    """Which would end a sequence of the loop: a token of one row brings them."""
    other = make_model("Llama")
    with accelerate(model, 64, run_ahead=ahead) as fast:
        works(fast, other)
        token = int(generate(other)[0, -4])
        for each in (model, other):
            each.get_input_embeddings().weight.data[token] = torch.nan
        options: dict[str, Any] = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True}
        got, want = generate(model, **options), generate(other, **options)
        assert got.sequences.tolist() == want.sequences.tolist()
        assert any(each.isnan().all(1).any() for each in want.logits)
        assert not want.logits[-1].isnan().all()
        assert not fast.reasons


def test_logits_that_are_no_numbers_for_a_while(model: PreTrainedModel) -> None:
    other = make_model("Llama")

    def process(of: PreTrainedModel) -> LogitsProcessorList:
        head = of.lm_head.weight.data.clone()

        def set_it(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            of.lm_head.weight.data[:] = torch.nan if tokens.shape[1] % 3 == 0 else head
            return scores

        return LogitsProcessorList([set_it])

    with accelerate(model, 64) as fast:
        works(fast, other)
        got, want = (generate(each, logits_processor=process(each), max_new_tokens=20) for each in (model, other))
        assert got.tolist() == want.tolist()
        assert not fast.reasons


def test_threads_take_turns(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    wanted = {seed: generate(plain, prompt(2, seed=seed)).tolist() for seed in range(6)}
    found: dict[int, Any] = {}
    with accelerate(model, 64, run_ahead=True) as fast:

        def work(seeds: range) -> None:
            for seed in seeds:
                found[seed] = generate(model, prompt(2, seed=seed)).tolist()

        threads = [threading.Thread(target=work, args=(range(start, 6, 3),)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == wanted
        works(fast, plain)
