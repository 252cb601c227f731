"""Fused parts of transformers' models: what is left to the model, and why."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from helpers.hf_fused import FAMILIES, WHOLE, forced, make
from helpers.hf_models import MODELS
from torch import nn

from vattn.hf import TransformersModel
from vattn.ops.ops_table import reference_ops


class Eps(nn.Module):
    """A norm with its epsilon outside of the root."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon**0.5))


class Adapter(nn.Module):
    """As adapters wrap a projection."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Int8(nn.Linear):
    """As quantised projections derive from Linear."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: out * 1.5)


def pre_hook(model):
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def adapter(model):
    layer = model.model.layers[1].self_attn
    layer.v_proj = Adapter(layer.v_proj).to(model.dtype)


def quantised(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj.__class__ = Int8


def own_forward(model):
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 1.5, None)


def eps(model):
    layer = model.model.layers[1]
    layer.input_layernorm = Eps(layer.input_layernorm)


def multiplier(model):
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("Scaled", (type(attention),), {})
    inside = attention.__class__.__mro__[1].forward
    attention.__class__.forward = lambda self, *args, **kwargs: (inside(self, *args, **kwargs)[0] * 1.1, None)


def bias(model):
    k_proj = model.model.layers[1].self_attn.k_proj
    k_proj.bias = nn.Parameter(torch.randn(k_proj.out_features, dtype=model.dtype))


@pytest.mark.parametrize(
    ("alter", "kind", "reason"),
    [
        (hook, "mlp", "its up_proj has hooks"),
        (pre_hook, "layer", "it has hooks"),
        (adapter, "attention", "its v_proj is a Adapter, not a torch.nn.Linear"),
        (quantised, "mlp", "its down_proj is a Int8, not a torch.nn.Linear"),
        (own_forward, "attention", "it has a forward of its own"),
        (eps, "norm", "it computes something else than its fused form"),
        (multiplier, "attention", "it computes something else than its fused form"),
        (bias, "attention", "only some of its projections have a bias"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_altered_module_is_left(alter, kind, reason, dtype):
    model = make("Llama").to(dtype)
    alter(model)
    if dtype == torch.float32:
        expected, _ = forced(model, fuse=False)
        got, report = forced(model)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        with TransformersModel(model, 128, fuse=True) as made:
            report = made.report
    assert reason in report.left[kind], str(report)
    assert report.left[kind][reason] == 1
    assert report.fused[kind] == WHOLE[kind] - 1
    assert report.fused["layer"] >= 3
    for line in (f"{kind}: {WHOLE[kind] - 1} fused, 1 left", f"  1 left: {reason}"):
        assert line in str(report).splitlines()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_too_large_to_be_widened_is_measured_by_itself(dtype, monkeypatch):
    monkeypatch.setattr("vattn.hf.fusion_check._WIDENED_BYTES", 0)
    for name in ("Llama", "Gemma 3"):
        with TransformersModel(make(name).to(dtype), 128, fuse=True) as made:
            assert made.report.fused == FAMILIES[name][1], str(made.report)
    model = make("Granite", residual_multiplier=0.5).to(dtype)
    for alter in (multiplier, eps):
        alter(model)
    with TransformersModel(model, 128, fuse=True) as made:
        reason = "it computes something else than its fused form"
        assert made.report.left == {
            "layer": {reason: 3, "its input_layernorm is left, a Eps": 1},
            "attention": {reason: 1},
            "norm": {reason: 1},
        }


def test_a_multiplier_of_the_residual_leaves_the_layer_and_fuses_its_parts():
    model = make("Granite", residual_multiplier=0.3, embedding_multiplier=3.0)
    own, _ = forced(model, fuse=False)
    got, report = forced(model)
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
    assert report.fused == {"attention": 4, "mlp": 4, "norm": 9, "output": 1}
    assert report.left == {"layer": {"it computes something else than its fused form": 4}}


@pytest.mark.parametrize("name", ["Gemma 4, shared K and V", "GPT-2", "HunYuanDenseV1", "BitNet"])
def test_other_structures_stay_the_models(name):
    """Shared K and V, projections with other names, norms of heads after the rotation, norms within attention."""
    assert name in MODELS
    own, _ = forced(make(name), fuse=False)
    got, report = forced(make(name))
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
    assert sum(report.left["attention"].values()) == 4


def test_references_and_defaults_are_the_same_on_a_cpu():
    assert torch.equal(forced(make("Llama"))[0], forced(make("Llama"), reference_ops())[0])
