"""The cache that an accelerated ``generate`` returns: gone on with, changed, copied, and given up."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers.accelerated import generate, works
from tests.helpers.hf_models import CACHE, prompt, with_cache
from vattn import ConfigError
from vattn.hf import accelerate


def answered(model: PreTrainedModel, **options: Any) -> Any:
    return generate(model, return_dict_in_generate=True, **options)


def next_logits(model: PreTrainedModel, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **with_cache(cache)).logits[:, -1]


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda cache: cache,
    "cropped": lambda cache: cache.crop(-4),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "swapped": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_returned_cache_can_be_worked_with(model: PreTrainedModel, plain: PreTrainedModel, operation: str) -> None:
    with accelerate(model, 64, run_ahead=True) as fast:
        mine, other = answered(model)[CACHE], answered(plain)[CACHE]
        for cache in (mine, other):
            OPERATIONS[operation](cache)
        tokens = prompt(2, seed=7, length=1).repeat(2, 1)[: {"repeated": 4, "selected": 1}.get(operation, 2)]
        assert mine.get_seq_length() == other.get_seq_length()
        assert mine.batch_size == len(tokens)
        for _ in range(3):
            got, want = next_logits(model, mine, tokens), next_logits(plain, other, tokens)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
            tokens = want.argmax(-1, keepdim=True)
        assert not fast.reasons
        assert fast.kv_cache is not None
        fast.kv_cache.check_integrity()


def test_a_copy_of_the_returned_cache_goes_its_own_way(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64):
        mine = answered(model)[CACHE]
        twin = copy.deepcopy(mine)
        tokens = prompt(2, seed=7, length=1)
        next_logits(model, mine, prompt(2, seed=8, length=1))
        got, want = next_logits(model, twin, tokens), next_logits(plain, answered(plain)[CACHE], tokens)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_copies_keep_their_slots_or_say_that_they_lost_them(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    tokens = prompt(2, seed=7, length=1)
    with accelerate(model, 64, max_batch=2):
        twin = copy.deepcopy(answered(model)[CACHE])
        generate(model, prompt(2, seed=4))
        got, want = next_logits(model, twin, tokens), next_logits(plain, answered(plain)[CACHE], tokens)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        held = answered(model, inputs=prompt(2, seed=5)), answered(model, inputs=prompt(2, seed=6))
        with pytest.raises(ConfigError, match="needed the room"):
            next_logits(model, twin, tokens)
        del held


@pytest.mark.parametrize("operation", ["copied", "repeated"])
def test_copies_that_nobody_has_any_more_make_room(
    model: PreTrainedModel, plain: PreTrainedModel, operation: str
) -> None:
    """As where many questions go on from one beginning."""

    def go_on(of: PreTrainedModel, beginning: Any, seed: int) -> Any:
        cache = copy.deepcopy(beginning[CACHE])
        text = torch.cat([beginning.sequences, prompt(2, seed=seed, length=3)], dim=1)
        if operation == "repeated":
            cache.batch_repeat_interleave(2)
            text = text.repeat_interleave(2, dim=0)
        return generate(of, text, attention_mask=torch.ones_like(text), **with_cache(cache)).tolist()

    with accelerate(model, 64, max_batch=4) as fast:
        mine, other = answered(model), answered(plain)
        for seed in range(6):
            assert go_on(model, mine, seed) == go_on(plain, other, seed)
        assert not fast.reasons
        assert fast.kv_cache is not None
        fast.kv_cache.check_integrity()


def test_a_cache_whose_call_was_interrupted_is_not_gone_on_with(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64) as fast:
        cache = answered(model)[CACHE]
        hf = fast.transformers_model
        assert hf is not None

        def interrupted(*args: Any) -> Any:
            raise KeyboardInterrupt

        hf.decode = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            next_logits(model, cache, prompt(2, length=1))
        del hf.decode
        with pytest.raises(ConfigError, match="are gone"):
            next_logits(model, cache, prompt(2, length=1))
        works(fast, plain)


def test_all_logits_of_several_tokens_are_the_models(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    tokens = prompt(2, seed=7, length=3)
    with accelerate(model, 64), torch.no_grad():
        mine, other = answered(model)[CACHE], answered(plain)[CACHE]
        with pytest.warns(UserWarning, match="logits of several tokens"):
            got = model(tokens, **with_cache(mine)).logits
        torch.testing.assert_close(got, plain(tokens, **with_cache(other)).logits, rtol=1e-3, atol=1e-3)


def test_returned_caches_give_way_to_later_calls(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64, max_batch=2) as fast:
        held = [answered(model) for _ in range(4)]
        with pytest.raises(ConfigError, match="needed the room"):
            next_logits(model, held[0][CACHE], prompt(2, length=1))
        next_logits(model, held[-1][CACHE], prompt(2, length=1))
        del held
        gc.collect()
        works_without_holding = generate(model).tolist()
        assert works_without_holding == generate(plain).tolist()
        assert fast.kv_cache is not None
        fast.kv_cache.check_integrity()


def test_a_returned_cache_is_of_no_use_elsewhere(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64):
        cache = answered(model)[CACHE]
        with pytest.raises(ConfigError, match="accelerated model alone"):
            next_logits(plain, cache, prompt(2, length=1))
        with pytest.raises(ConfigError, match="pickled"):
            pickle.dumps(cache)
    for of in (model, plain):
        with pytest.raises(ConfigError):
            next_logits(of, cache, prompt(2, length=1))
