"""Fused parts of transformers' models: the same numbers as the models' own, in every family."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from helpers.hf_fused import EXPERTS, FAMILIES, NEW_TOKENS, SANDWICH, forced, greedy, make, prompts
from helpers.hf_models import prompt

from vattn import ConfigError, Engine, KVCache, Request
from vattn.attention.rope_decode import rope_decode
from vattn.hf import TransformersModel, fused_layers
from vattn.ops.ops_table import LinearTable, fused_ops, reference_ops
from vattn.ops.skinny_linear import LinearConfig
from vattn.ops.triton_support import unavailable


class Skinny(LinearTable):
    """A Triton kernel for every product of few tokens, in partial sums where that is allowed."""

    def find(self, outputs, inputs, tokens, swiglu=False):
        return LinearConfig(16, 32, 1 if swiglu else 2) if tokens <= 16 else None


@pytest.mark.parametrize("name", FAMILIES)
def test_token_for_token_in_float32(name):
    model = make(name)
    expected = []
    for each in prompts():
        tokens = torch.tensor([each])
        expected.append(model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(each) :].tolist())
    with TransformersModel(model, 128, fuse=True) as made:
        assert made.report.fused == FAMILIES[name][1], str(made.report)
        assert greedy(made) == expected
    assert any(len(set(tokens)) > 4 for tokens in expected)  # it says something


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_in_bfloat16_are_as_near_as_the_models_own(name):
    exact, own, got = [], [], []
    for seed in (2, 3, 4):
        exact.append(forced(make(name, seed=seed), fuse=False)[0])
        own.append(forced(make(name, seed=seed).bfloat16(), fuse=False)[0])
        logits, report = forced(make(name, seed=seed).bfloat16())
        got.append(logits)
        assert report.fused == FAMILIES[name][1], str(report)
    exact, own, got = (torch.stack(each) for each in (exact, own, got))
    error, allowed = (got - exact).abs(), (own - exact).abs()
    if "MoE" in name or name in ("Mixtral", "Olmoe", "GPT-OSS"):  # a near choice of experts falls this way or that
        error, allowed = error.median(), allowed.median()
        assert error <= 2 * allowed
    else:
        assert error.max() <= 2 * allowed.max()
        assert error.mean() <= 1.5 * allowed.mean()
    assert not torch.equal(got, own)  # it did run something else


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma 3", "Phi-3", "OLMo-2", "Glm4", "Cohere2", "Mixtral"])
@pytest.mark.parametrize("one_kernel", [False, True])
def test_triton_kernels(name, one_kernel, device, monkeypatch):
    """In the interpreter where there is no GPU; rotary embedding and attention apart, or as one kernel."""
    calls = []
    monkeypatch.setattr("vattn.attention.rope_decode.MIN_SEQUENCES", 1 if one_kernel else 99)
    monkeypatch.setattr(fused_layers, "rope_decode", lambda *args, **kw: calls.append(1) or rope_decode(*args, **kw))
    monkeypatch.setattr("vattn.hf.fused_parts.MOST_PAIRS", 16)  # the interpreter is slow
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1} | (
        {"layer_types": ["sliding_attention"]} if name in ("Gemma 3", "Cohere2") else {}
    )
    own, _ = forced(make(name, **small).to(device), fuse=False, steps=2)
    got, report = forced(make(name, **small).to(device), fused_ops(Skinny({})), steps=2, decode="triton-decode")
    assert bool(calls) is one_kernel
    assert report.fused == {kind: -(-count // 4) for kind, count in FAMILIES[name][1].items()}, str(report)
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_a_prompt_of_many_tokens(name):
    """Of more than skinny products take: the last of a layer is added to the stream by itself."""
    model, text = make(name), prompt(1, seed=3, length=200)
    expected = model.generate(text, max_new_tokens=NEW_TOKENS, do_sample=False)[0, 200:].tolist()
    with TransformersModel(model, 256, fuse=True) as made, Engine(made, memory_limit=64 << 20) as engine:
        assert made.report.fused["layer"] == 4
        (done,) = engine.generate([Request(text[0].tolist(), NEW_TOKENS)])
        assert list(done.tokens) == expected


def test_experts_of_many_tokens_are_the_models_own(monkeypatch):
    model = make("Qwen3-MoE")
    own, _ = forced(make("Qwen3-MoE"), fuse=False)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[1].numel())
        return reference_ops().experts(*args, **kwargs)

    monkeypatch.setattr("vattn.hf.fused_parts.MOST_PAIRS", 16)
    got, report = forced(model, replace(reference_ops(), experts=counted))
    assert report.fused == EXPERTS
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
    assert max(calls) == 16  # of 84 in the prompts' pass


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Phi-3", "Qwen2", "Qwen3-MoE"])
def test_closing_leaves_nothing(name):
    model = make(name)
    attributes = {module: set(vars(module)) for module in model.modules()}
    with torch.no_grad():
        before = model(prompt(2)).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with TransformersModel(model, 128, fuse=True) as made:
        assert made.report.fused["layer"] == 4
        inside = [module for module in model.modules() if "forward" in vars(module)]
        assert inside
        with torch.no_grad():  # outside of a pass the model is its own
            assert torch.equal(model(prompt(2)).logits, before)
    assert {module: set(vars(module)) for module in model.modules()} == attributes
    with torch.no_grad():
        assert torch.equal(model(prompt(2)).logits, before)
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    loss = model(prompt(1)).logits.sum()
    loss.backward()  # parameters can still be trained
    assert all(
        each.grad is not None for each in (model.model.layers[0].self_attn.o_proj.weight, *model.lm_head.parameters())
    )
    with TransformersModel(model, 128, fuse=True) as again:
        assert again.report == made.report


def test_without_fusing_the_model_is_captured_as_it_is():
    model = make("Llama")
    with TransformersModel(model, 128, fuse=False) as made:
        assert not any("forward" in vars(module) for module in model.modules())
        assert (made.report.fused, str(made.report)) == ({}, "nothing was fused")
    with TransformersModel(model, 128) as made:  # references of a CPU are no faster
        assert bool(made.report.fused) == (made.ops.name == "fused")


def test_merged_weights_take_no_more_memory():
    model = make("Llama")
    layer = model.model.layers[1]
    with TransformersModel(model, 128, fuse=True):
        storages = {
            each.weight.untyped_storage().data_ptr()
            for each in layer.self_attn.children()
            if each.weight.shape[1] == 64
        }
        assert len(storages) == 2  # Q, K and V share one; the output projection has its own
        assert (
            layer.mlp.gate_proj.weight.untyped_storage().data_ptr()
            == layer.mlp.up_proj.weight.untyped_storage().data_ptr()
        )
        total = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
        assert sum(total.values()) == sum(each.nbytes for each in model.parameters())


def test_tied_embeddings_stay_tied():
    model = make("Gemma 2", tie_word_embeddings=True)
    own, _ = forced(make("Gemma 2", tie_word_embeddings=True), fuse=False)
    got, report = forced(model)
    assert report.fused == SANDWICH
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)


def test_weights_that_change_in_place_are_used():
    """Also where weights are added to one, as Gemma's."""
    for name in ("Llama", "Gemma 3"):
        model, other = make(name), make(name, seed=7)
        with TransformersModel(other, 128, fuse=True) as made:
            expected = greedy(made)
        with TransformersModel(model, 128, fuse=True) as made:
            assert greedy(made) != expected
            model.load_state_dict(other.state_dict())
            assert greedy(made) == expected


def test_a_model_that_was_converted_is_refused():
    model = make("Llama")
    with TransformersModel(model, 128, fuse=True) as made, KVCache(made.kv_layout(), 2, "cpu") as cache:
        made.require_fit(cache)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        with pytest.raises(ConfigError, match="make a new"):
            made.require_fit(cache)


def test_a_hook_that_would_be_passed_over_is_refused():
    """One of a fused layer itself, or of a module that is still called, runs."""
    model = make("Qwen3-MoE")
    layer, seen = model.model.layers[2], []
    with TransformersModel(model, 128, fuse=True) as made:
        for module in (layer, layer.mlp, layer.mlp.experts):
            module.register_forward_pre_hook(lambda module, args: seen.append(module))
        greedy(made)
        assert set(seen) == {layer, layer.mlp, layer.mlp.experts}
        hook = layer.self_attn.register_forward_hook(lambda module, args, out: (out[0] * 2, None))
        with pytest.raises(ConfigError, match="Qwen3MoeAttention has hooks since it was fused"):
            greedy(made)
        hook.remove()
        greedy(made)
