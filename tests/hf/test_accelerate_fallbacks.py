"""``accelerate`` where captured steps cannot serve a call, or the model as it is: its own forward computes it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, StaticCache

from tests.helpers.accelerated import NEW, generate, works
from tests.helpers.hf_models import make_model, prompt, with_cache
from vattn.hf import accelerate


# -- calls that captured steps cannot serve ---------------------------------------------------------------------------
def right_padded() -> dict[str, Any]:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 8:] = 0
    return {"inputs": prompt(2) * mask, "attention_mask": mask}


def with_holes() -> dict[str, Any]:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 3:5] = 0
    return {"inputs": prompt(2), "attention_mask": mask}


def own_loop(model: PreTrainedModel, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], dim=1)


CANNOT: dict[str, tuple[str, Callable[[PreTrainedModel], dict[str, Any]]]] = {
    "an assistant": ("assisted", lambda plain: {"inputs": prompt(1), "assistant_model": make_model("Llama", seed=3)}),
    "prompt lookup": ("assisted", lambda plain: {"inputs": prompt(1).repeat(1, 3), "prompt_lookup_num_tokens": 3}),
    "a cache of the user's": ("DynamicCache", lambda plain: with_cache(DynamicCache())),
    "a static cache of the user's": (
        "StaticCache",
        lambda plain: with_cache(StaticCache(config=plain.config, max_cache_len=40)),
    ),
    "cache_implementation": ("cache_implementation", lambda plain: {"cache_implementation": "static"}),
    "use_cache=False": ("use_cache", lambda plain: {"use_cache": False}),
    "attentions": ("output_attentions", lambda plain: {"output_attentions": True, "return_dict_in_generate": True}),
    "hidden states": (
        "output_hidden_states",
        lambda plain: {"output_hidden_states": True, "return_dict_in_generate": True},
    ),
    "embeddings": ("inputs_embeds", lambda plain: {"inputs_embeds": plain.get_input_embeddings()(prompt(2))}),
    "a loop of the user's": ("custom_generate", lambda plain: {"custom_generate": own_loop}),
    "padding on the right": ("padding", lambda plain: right_padded()),
    "holes": ("holes", lambda plain: with_holes()),
    "positions": ("position_ids", lambda plain: {"position_ids": torch.arange(11)[None] * 2}),
}


@pytest.mark.parametrize("case", CANNOT)
def test_the_models_own_forward_takes_what_is_left(model: PreTrainedModel, plain: PreTrainedModel, case: str) -> None:
    reason, options = CANNOT[case]
    if case == "attentions":
        for each in (model, plain):
            each.set_attn_implementation("eager")

    def tokens(of: PreTrainedModel) -> list[list[int]]:
        given = options(plain)
        found = generate(of, given.pop("inputs"), **given) if "inputs" in given else generate(of, **given)
        return getattr(found, "sequences", found).tolist()

    with accelerate(model, 64, run_ahead=True) as fast:
        with pytest.warns(UserWarning, match=f"accelerate: .*{reason}"):
            got = tokens(model)
        with warnings.catch_warnings():  # said once
            warnings.filterwarnings("error", message="accelerate:")
            assert tokens(model) == got
        assert got == tokens(plain)
        assert len(fast.reasons) == 1
        works(fast, plain)


def test_classifier_free_guidance_runs_the_model_beside(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """transformers' processor calls the model with a cache of its own, in the middle of generate."""
    with accelerate(model, 64, run_ahead=True) as fast:
        assert generate(model, guidance_scale=1.5).tolist() == generate(plain, guidance_scale=1.5).tolist()
        assert not fast.reasons


def test_generate_inside_of_generate(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    inner = []

    def process(of: PreTrainedModel) -> LogitsProcessorList:
        def again(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            inner.append(generate(of, prompt(1, seed=int(tokens[0, -1]))).tolist())
            return scores

        return LogitsProcessorList([again])

    with accelerate(model, 64, run_ahead=True) as fast, pytest.warns(UserWarning, match="inside of generate"):
        got = generate(model, logits_processor=process(model)).tolist()
    assert got == generate(plain, logits_processor=process(plain)).tolist()
    assert inner[:NEW] == inner[NEW:]
    assert len(fast.reasons) == 1


@pytest.mark.parametrize("beams", [1, 2])
def test_a_text_longer_than_max_length_goes_on_by_the_model(
    model: PreTrainedModel, plain: PreTrainedModel, beams: int
) -> None:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 30, "num_beams": beams}
    with accelerate(model, 24, run_ahead=True) as fast:
        with pytest.warns(UserWarning, match="max_length=24"):
            got = generate(model, prompt(2) * mask, **options)
        assert got.tolist() == generate(plain, prompt(2) * mask, **options).tolist()
        works(fast, plain)


@pytest.mark.parametrize("name", ["Gemma 3", "Gemma 4, shared K and V", "Mistral, window 16"])
def test_windows_survive_the_change(name: str) -> None:
    plain, model = make_model(name), make_model(name)
    with accelerate(model, 40) as fast, pytest.warns(UserWarning, match="max_length"):
        assert generate(model, max_new_tokens=50).tolist() == generate(plain, max_new_tokens=50).tolist()
    assert len(fast.reasons) == 1


# -- the model as it is -----------------------------------------------------------------------------------------------
def test_in_training_mode(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    model.train()
    with accelerate(model, 64) as fast:
        with pytest.warns(UserWarning, match="training mode"):
            generate(model)
        works_after = model.eval()
        assert works_after is model
        works(fast, plain)
        model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generate(model)
        assert len(fast.reasons) == 1


def test_autocast(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with accelerate(model, 64) as fast:
        with pytest.warns(UserWarning, match="autocast"), torch.autocast("cpu", torch.bfloat16):
            got = generate(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert got.tolist() == generate(plain).tolist()
        works(fast, plain)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "hook of the model"])
def test_hooks_are_called(model: PreTrainedModel, kind: str) -> None:
    other = make_model("Llama")

    def halve(module: Any, args: Any, output: Any) -> Any:
        return output / 2 if isinstance(output, torch.Tensor) else output

    def halve_before(module: Any, args: Any) -> Any:
        return (args[0] / 2,)

    def flip(module: Any, args: Any, output: Any) -> Any:
        output.logits = -output.logits
        return output

    handles = []
    for each in (model, other):
        layer = each.model.layers[1].mlp
        handles.append(
            layer.register_forward_hook(halve)
            if kind == "hook"
            else layer.register_forward_pre_hook(halve_before)
            if kind == "pre-hook"
            else each.register_forward_hook(flip)
        )
    with accelerate(model, 64) as fast:
        with pytest.warns(UserWarning, match="hook"):
            got = generate(model)
        assert got.tolist() == generate(other).tolist()
        for handle in handles:
            handle.remove()
        works(fast, other)


def test_transformers_own_hooks_are_no_reason(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """With which it collects hidden states, and which it leaves behind."""
    generate(model, output_hidden_states=True, return_dict_in_generate=True)
    with accelerate(model, 64) as fast:
        works(fast, plain)


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "converted": lambda model: model.to(torch.float64),
    "converted there and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "loaded in place": lambda model: model.load_state_dict(make_model("Llama", seed=9).state_dict()),
    "loaded by assignment": lambda model: model.load_state_dict(make_model("Llama", seed=9).state_dict(), assign=True),
    "another head": lambda model: setattr(model, "lm_head", copy.deepcopy(make_model("Llama", seed=9).lm_head)),
    "another layer": lambda model: model.model.layers.__setitem__(1, make_model("Llama", seed=9).model.layers[1]),
    "another activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.Tanh()),
    "another forward": lambda model: setattr(model.model.layers[0].mlp, "forward", lambda x: x * 0.5),
    "another weight": lambda model: setattr(model.model.norm, "weight", torch.nn.Parameter(torch.ones(64) * 3)),
    "changed in place": lambda model: model.model.norm.weight.data.mul_(-2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_is_run_as_it_is(model: PreTrainedModel, change: str) -> None:
    other = make_model("Llama")
    with accelerate(model, 64) as fast:
        works(fast, other)
        for each in (model, other):
            CHANGES[change](each)
        assert generate(model).tolist() == generate(other).tolist()
        # The other model's layer has its own config, where it looks its attention up.
        assert len(fast.reasons) == (change == "another layer")
    assert generate(model).tolist() == generate(other).tolist()
