"""``accelerate`` while a model's code and settings change: the tokens of its own forward by then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers.accelerated import generate, works
from tests.helpers.hf_models import CACHE, make_model, prompt, with_cache
from vattn import ConfigError, Engine, Request
from vattn.hf import TransformersModel, accelerate


@pytest.fixture
def other() -> PreTrainedModel:
    return make_model("Llama")


def doubled_layer(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs) * 2


def wrapped_layer(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs) * 2


def another_class(model: PreTrainedModel) -> None:
    kind = type(model)

    class Negative(kind):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = -out.logits
            return out

    model.__class__ = Negative


def scales(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9


def epsilons(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


CHANGES: dict[str, Callable[[PreTrainedModel], None]] = {
    "a layer's forward": doubled_layer,
    "a layer's forward, around": wrapped_layer,
    "class": another_class,
    "scales": scales,
    "epsilons": epsilons,
    "a window in the config": lambda model: setattr(model.config, "sliding_window", 4),
    "a smaller vocabulary in the config": lambda model: setattr(model.config, "vocab_size", 50),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_code_and_settings(model: PreTrainedModel, other: PreTrainedModel, change: str, fuse: bool) -> None:
    with accelerate(model, 64, fuse=fuse) as fast:
        works(fast, other)
        for each in (model, other):
            CHANGES[change](each)
        wanted = generate(other).tolist()
        assert generate(model).tolist() == wanted
    assert generate(model).tolist() == wanted


def test_a_forward_of_every_instance(
    model: PreTrainedModel, other: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libraries replace those of transformers' classes."""
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    with accelerate(model, 64, fuse=True) as fast:
        works(fast, other)
        before = generate(model).tolist()
        monkeypatch.setattr(kind, "forward", lambda mlp, x: own(mlp, x) * 3)
        assert generate(model).tolist() == generate(other).tolist() != before


def test_hooks_of_all_modules_are_called(model: PreTrainedModel, other: PreTrainedModel) -> None:
    calls = []
    with accelerate(model, 64, fuse=True) as fast:
        works(fast, other)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
        with handle, pytest.warns(UserWarning, match="hooks of all modules"):
            generate(model)
        assert model.model.layers[0].mlp.act_fn in calls
        works(fast, other)


def test_settings_that_stay_open_nothing_anew(model: PreTrainedModel, other: PreTrainedModel) -> None:
    with accelerate(model, 64) as fast:
        works(fast, other)
        cache = fast.kv_cache
        model.train().eval()
        model.generation_config.repetition_penalty = other.generation_config.repetition_penalty = 1.2
        model.set_attn_implementation("eager")
        works(fast, other)
        assert fast.kv_cache is cache


def test_a_returned_cache_is_of_the_model_as_it_was(model: PreTrainedModel) -> None:
    with accelerate(model, 64):
        cache = generate(model, return_dict_in_generate=True)[CACHE]
        model.to(torch.float64)
        with pytest.raises(ConfigError, match="the model changed"):
            model(prompt(2, length=1), **with_cache(cache))


def test_a_returned_cache_goes_on_in_training_mode(model: PreTrainedModel, other: PreTrainedModel) -> None:
    with accelerate(model, 64), torch.no_grad():
        mine, default = (generate(each, return_dict_in_generate=True)[CACHE] for each in (model, other))
        model.train()
        with pytest.warns(UserWarning, match="training mode"):
            got = model(prompt(2, length=1), **with_cache(mine)).logits
        torch.testing.assert_close(got, other(prompt(2, length=1), **with_cache(default)).logits, rtol=1e-3, atol=1e-3)


# -- other users of the same model ------------------------------------------------------------------------------------
def test_a_transformers_model_of_an_accelerated_one(model: PreTrainedModel, other: PreTrainedModel) -> None:
    with accelerate(model, 64, fuse=True) as fast:
        works(fast, other)
        with pytest.raises(ConfigError, match="perhaps accelerate's"):
            TransformersModel(model)
        works(fast, other)
    TransformersModel(model).close()


def test_attention_that_is_changed_under_an_engine(model: PreTrainedModel) -> None:
    """It would compute a pass as a text of its own."""
    with TransformersModel(model, fuse=False) as ours, Engine(ours) as engine:
        assert engine.generate([Request([1, 2, 3], max_new_tokens=2)])[0].finish_reason == "length"
        model.set_attn_implementation("eager")
        completion = engine.generate([Request([1, 2, 3, 4], max_new_tokens=2)])[0]
        assert completion.finish_reason == "error"
        assert "attention was set" in str(completion.error)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model(model: PreTrainedModel, other: PreTrainedModel, how: str) -> None:
    """``torch.compile`` reaches into what its model calls."""
    with accelerate(model, 64) as fast, torch.no_grad():
        compiled: Any = torch.compile(model, backend="eager") if how == "wrapped" else model
        if how == "in place":
            model.compile(backend="eager")
        for _ in range(2):
            assert generate(compiled).tolist() == generate(other).tolist()
            torch.testing.assert_close(compiled(prompt(2)).logits, other(prompt(2)).logits)
        assert not fast.reasons


def test_other_threads_run_the_model_while_its_parts_are_fused(model: PreTrainedModel, other: PreTrainedModel) -> None:
    with torch.no_grad():
        wanted = other(prompt(2)).logits
    ended, wrong = threading.Event(), []

    @torch.no_grad()
    def run() -> None:
        try:
            while not ended.is_set():
                if not torch.equal(model(prompt(2)).logits, wanted):
                    wrong.append("logits")
        except Exception as error:
            wrong.append(str(error))

    with accelerate(model, 64, fuse=True) as fast:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for each in threads:
            each.start()
        try:
            works(fast, other)
        finally:
            ended.set()
            for each in threads:
                each.join()
        assert fast.transformers_model is not None
        report = fast.transformers_model.report
    assert not wrong
    assert report.fused["layer"] == 4
    assert not report.left
