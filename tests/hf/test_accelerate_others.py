"""``accelerate`` of models that other libraries have changed: offloaded, quantised, adapted, scripted, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tests.helpers.accelerated import generate, works
from tests.helpers.hf_models import CACHE, make_model, prompt, with_cache
from vattn import ConfigError, KVCache
from vattn.hf import TransformersModel, accelerate
from vattn.hf.examine_generation import fingerprint


def each_linear(model: PreTrainedModel, change: Callable[[nn.Linear], nn.Module]) -> None:
    for part in list(model.model.layers.modules()):
        for name, child in list(part.named_children()):
            if type(child) is nn.Linear:
                setattr(part, name, change(child))


class Packed(nn.Module):
    """A projection whose weights are whole numbers of a byte, as quantisers make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale)


class Rounding(nn.Linear):
    """A Linear by its type and its weight, and not by what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.round(decimals=1)) * 1.1


def rounding(linear: nn.Linear) -> nn.Module:
    linear.__class__ = Rounding
    return linear


class Wrapped(torch.Tensor):
    """A weight that holds others, and has no address: as torchao's. Some, as optimum-quanto's, cannot be converted."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor) -> None:
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.packed.to(x.dtype) * weight.scale, *bias)
        if func is torch.Tensor.to:
            raise ValueError("the dtype of these weights cannot be changed")
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scale)
        raise NotImplementedError(f"{func} of a wrapped weight")


def wrapped(linear: nn.Linear) -> nn.Module:
    packed = Packed(linear)
    linear.weight = nn.Parameter(Wrapped(packed.packed, packed.scale), requires_grad=False)
    return linear


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", [Packed, rounding, wrapped])
def test_weights_of_other_kinds(kind: Callable[[nn.Linear], nn.Module], fuse: bool) -> None:
    """Before accelerate() and inside of it; what fits is fused around them."""
    model, other = make_model("Llama"), make_model("Llama")
    with accelerate(model, 64, fuse=fuse) as fast:
        works(fast, other)
        for each in (model, other):
            each_linear(each, kind)
        works(fast, other)
    with accelerate(model, 64, fuse=fuse) as fast:
        generate(model)
        works(fast, other)
        assert not fast.reasons
        assert fast.transformers_model is not None
        report = fast.transformers_model.report
        assert report.fused == ({"layer": 4, "norm": 9, "output": 1} if fuse else {})
    assert generate(model).tolist() == generate(other).tolist()


class ByPass(nn.Linear):
    """Activations are rounded by the largest of the pass, as torch's dynamic quantisation does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax() / 3
        return super().forward((x / step).round() * step)


def by_pass(linear: nn.Linear) -> nn.Module:
    linear.__class__ = ByPass
    return linear


@pytest.mark.parametrize("fuse", [True, False])
def test_activations_that_are_quantised_by_pass(fuse: bool) -> None:
    model, other = make_model("Llama"), make_model("Llama")
    for each in (model, other):
        each_linear(each, by_pass)
    with accelerate(model, 64, fuse=fuse), pytest.warns(UserWarning, match="quantised activations"):
        assert generate(model).tolist() == generate(other).tolist()
    with pytest.raises(ConfigError, match="quantised activations"):
        TransformersModel(model, fuse=fuse)


def test_weights_without_an_address() -> None:
    model, other = make_model("Llama"), make_model("Llama")
    for each in (model, other):
        up = each.model.layers[1].mlp.up_proj
        up.weight = nn.Parameter(up.weight.detach().to_sparse_csr(), requires_grad=False)
    with accelerate(model, 64), pytest.warns(UserWarning, match="because"):
        assert generate(model).tolist() == generate(other).tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part() -> None:
    """Its class has no forward to look at."""
    model, other = make_model("Llama"), make_model("Llama")
    for each in (model, other):
        each.model.layers[0].mlp.act_fn = torch.jit.trace(nn.SiLU(), torch.zeros(1, 1, 128))
    with accelerate(model, 64) as fast:
        assert generate(model).tolist() == generate(other).tolist()
        assert not fast.reasons


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_layers_that_are_compiled_by_themselves(how: str) -> None:
    model, other = make_model("Llama"), make_model("Llama")
    layers = model.model.layers
    for i in range(2):
        if how == "in place":
            layers[i].compile(backend="eager")
        else:
            layers[i] = torch.compile(layers[i], backend="eager")
    with accelerate(model, 64, fuse=True) as fast:
        assert generate(model).tolist() == generate(other).tolist()
        assert not fast.reasons


# -- several devices --------------------------------------------------------------------------------------------------
def test_weights_that_come_when_they_are_used() -> None:
    """As offloading leaves all of them on ``meta``, and brings them for the forward."""
    model, other, twin = (make_model("Llama") for _ in range(3))
    twin.to("meta")
    brought = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    model.to("meta")

    @functools.wraps(twin.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return functional_call(twin, brought, args, kwargs)

    model.forward = forward
    with accelerate(model, 64) as fast:
        with pytest.warns(UserWarning, match="is on meta, a TransformersModel needs it on one"):
            assert generate(model).tolist() == generate(other).tolist()
        assert "is on meta, a TransformersModel" in repr(fast)


# -- around the model -------------------------------------------------------------------------------------------------
class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize("holder", [accelerate, TransformersModel])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (Around, "a Around: give it the LlamaForCausalLM inside"),
        (lambda model: torch.compile(model, backend="eager"), "give it the LlamaForCausalLM inside"),
        (torch.nn.DataParallel, "a DataParallel: give it the LlamaForCausalLM inside"),
    ],
)
def test_what_is_around_a_model_is_named(holder: Callable[..., Any], wrap: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        holder(wrap(make_model("Llama")))


def replaced(model: PreTrainedModel) -> None:
    model.forward = MethodType(type(model).forward, model)


def negated(model: PreTrainedModel) -> None:
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = -out.logits
        return out

    model.forward = functools.update_wrapper(forward, own)


@pytest.mark.parametrize("change", [replaced, negated])
def test_a_forward_put_in_place_of_accelerates(change: Callable[[PreTrainedModel], None]) -> None:
    """As libraries add hooks to a model, and remove them again: by its forward."""
    model, other = make_model("Llama"), make_model("Llama")
    with accelerate(model, 64) as fast:
        works(fast, other)
        before = vars(model)["forward"]
        for each in (model, other):
            change(each)
        with pytest.warns(UserWarning, match="forward was replaced"):
            assert generate(model).tolist() == generate(other).tolist()
        assert "forward was replaced" in repr(fast)
        model.forward = before
        works(fast, make_model("Llama"))
        change(model)
    assert generate(model).tolist() == generate(other).tolist()
    model.forward = before  # kept by somebody, such as what takes a hook off again
    with accelerate(model, 64) as fast:
        generate(model)
        works(fast, make_model("Llama"))


def test_a_cache_goes_on_under_a_forward_around_accelerates() -> None:
    model, other = make_model("Llama"), make_model("Llama")
    with accelerate(model, 64), torch.no_grad():
        mine, default = (generate(each, return_dict_in_generate=True)[CACHE] for each in (model, other))
        for each in (model, other):
            negated(each)
        with pytest.warns(UserWarning, match="forward was replaced"):
            got = model(prompt(2, length=1), **with_cache(mine)).logits
        torch.testing.assert_close(got, other(prompt(2, length=1), **with_cache(default)).logits, rtol=1e-3, atol=1e-3)


# -- repr -------------------------------------------------------------------------------------------------------------
def test_what_it_says_of_itself() -> None:
    model = make_model("Llama")
    with accelerate(model, 64) as fast:
        assert repr(fast) == "<Accelerated LlamaForCausalLM on cpu: nothing generated yet>"
        generate(model)
        assert repr(fast) == "<Accelerated LlamaForCausalLM on cpu: steps that run eagerly, as CUDA graphs need a GPU>"
        model.train()
        assert repr(fast).endswith(
            ": the model's own forward, because the model is in training mode (call model.eval())>"
        )
        model.eval()
    assert repr(fast) == "<Accelerated LlamaForCausalLM on cpu: restored>"
    falcon = make_model("Falcon")
    with accelerate(falcon, 64) as fast:
        with pytest.warns(UserWarning, match="accelerate"):
            generate(falcon)
        assert "on cpu: the model's own forward, because FalconForCausalLM computes attention by itself" in repr(fast)


# -- what a graph would keep as it was --------------------------------------------------------------------------------
def transposed(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.t()


@pytest.mark.parametrize("fuse", [True, False])
def test_a_weight_that_is_read_the_other_way(fuse: bool) -> None:
    """At the same address, in the same shape."""
    model, other = make_model("Llama"), make_model("Llama")
    with accelerate(model, 64, fuse=fuse) as fast:
        works(fast, other)
        for each in (model, other):
            transposed(each)
        works(fast, other)


def test_a_weight_that_is_read_the_other_way_since_it_was_fused() -> None:
    model = make_model("Llama")
    with TransformersModel(model, fuse=True) as ours, KVCache(ours.kv_layout(64), 2, "cpu", page_bytes=4096) as cache:
        ours.require_fit(cache)
        transposed(model)
        with pytest.raises(ConfigError, match="moved, converted"):
            ours.require_fit(cache)


def wrap_up(model: PreTrainedModel) -> None:
    wrapped(model.model.layers[0].mlp.up_proj)


GRAPHS_KEEP: dict[str, Callable[[nn.Module], object]] = {
    "a tensor": lambda part: setattr(part, "plain", torch.zeros(3)),
    "numbers of a tensor at another place": lambda part: setattr(part.plain, "data", torch.zeros(3)),
    "a list": lambda part: part.numbers.append(3),
    "a dict": lambda part: part.names.update(default=0.5),
    "a nested list": lambda part: part.names["more"].append(1.0),
    "a dtype": lambda part: setattr(part, "wanted", torch.float16),
    "a wrapped weight": lambda part: setattr(part.up_proj.weight, "packed", part.up_proj.weight.packed.clone()),
    "a transposed buffer": lambda part: setattr(part, "square", part.square.t()),
}


@pytest.mark.parametrize("change", GRAPHS_KEEP)
def test_what_a_graph_would_keep_is_seen(change: str) -> None:
    """On a CPU no graph is there to go stale: whether the next call would look at the model anew is."""
    model = make_model("Llama")
    wrap_up(model)
    part: Any = model.model.layers[0].mlp
    part.plain, part.numbers, part.names, part.wanted = torch.ones(3), [1, 2], {"default": 1.0, "more": [2.0]}, None
    part.register_buffer("square", torch.arange(9.0).view(3, 3))
    before = fingerprint(model)
    assert fingerprint(model) == before
    GRAPHS_KEEP[change](part)
    assert fingerprint(model) != before


# -- PEFT ------------------------------------------------------------------------------------------------------------
def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(make_model("Llama"), config)
        model.add_adapter("other", config)
        return model.eval()

    mine, other = adapted(), adapted()
    model = mine.get_base_model()
    with pytest.raises(ConfigError, match="merge its adapters"):
        accelerate(mine)

    def same() -> None:
        assert generate(mine).tolist() == generate(other).tolist()
        assert generate(model).tolist() == generate(other.get_base_model()).tolist()

    with accelerate(model, 64, fuse=True) as fast:
        with pytest.warns(UserWarning, match="PEFT"):
            same()
        with mine.disable_adapter(), other.disable_adapter():
            same()
        for change in ("set_adapter('other')", "merge_adapter()", "unmerge_adapter()", "set_adapter('default')"):
            for each in (mine, other):
                name, _, argument = change.rstrip(")").partition("(")
                getattr(each, name)(*filter(None, [argument.strip("'")]))
            same()
        assert mine.merge_and_unload() is model
        works(fast, other.merge_and_unload())
        assert len(fast.reasons) == 1


def test_a_forward_that_keeps_a_tensor_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves on its module is another tensor after every pass; another one of the user's still counts."""
    model, plain = make_model("Llama"), make_model("Llama")

    class Norm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = super().forward(x) * self.factor
            return self.last

    for each in (model, plain):
        each.model.norm.__class__ = Norm
        each.model.norm.factor = torch.tensor(1.0)
    built = []
    init = TransformersModel.__init__

    def counted(self: TransformersModel, *args: Any, **options: Any) -> None:
        built.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(TransformersModel, "__init__", counted)
    with accelerate(model, 128, memory_limit=8 << 20) as fast:
        for new in (4, 5, 6):
            generate(model, max_new_tokens=new)
        assert (len(built), fast.reasons) == (1, [])
        for each in (model, plain):
            each.model.norm.factor = torch.tensor(-1.0)
        works(fast, plain)
        assert len(built) == 2
