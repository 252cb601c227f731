"""Decode steps of a ``VirtualCache`` by vattn's own launches; without a GPU through Triton's interpreter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
from hf_models import make_model, prompt  # noqa: E402

from vattn.attention import uniform_step  # noqa: E402
from vattn.hf import VirtualCache, storage  # noqa: E402

NEW_TOKENS = 7


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    monkeypatch.setattr(storage, "supports_uniform_step", lambda *_: True)


def count(monkeypatch, name, function):
    """Count the calls of a function, and do as it does."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(uniform_step.UniformStep, name, counted)
    return calls


def generate(model, mask, **options):
    return model.generate(
        prompt(2).to(model.device), attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **options
    )


def mask_of(padding, device):
    mask = torch.ones_like(prompt(2)).to(device)
    mask[0, :padding] = 0
    return mask


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("name", ["Llama", "Mistral, window 16", "Qwen3", "Gemma 2", "GPT-OSS"])
def test_the_default_cache_s_tokens(name, padding, device, monkeypatch):
    model = make_model(name).to(device)
    mask = mask_of(padding, device)
    wanted = generate(model, mask)
    calls = count(monkeypatch, "attend", uniform_step.UniformStep.attend)
    with VirtualCache(model.config, max_length=64) as past:
        got = generate(model, mask, past_key_values=past)
        past.kv_cache.check_integrity()
    assert len(calls) == (NEW_TOKENS - 1) * model.config.num_hidden_layers
    assert torch.equal(got, wanted)


def test_a_machine_on_which_they_do_not_work(device, monkeypatch):
    """No compiler, say: one warning, and torch's operations from there on."""
    model = make_model("Llama").to(device)
    mask = mask_of(3, device)
    wanted = generate(model, mask)

    def fail(*_args, **_kwargs):
        raise RuntimeError("no C compiler was found")

    monkeypatch.setattr(uniform_step.UniformStep, "attend", fail)
    with VirtualCache(model.config, max_length=64) as past:
        with pytest.warns(UserWarning, match="no C compiler") as noted:
            got = generate(model, mask, past_key_values=past)
        assert len([each for each in noted if "vattn" in str(each.message)]) == 1
        assert torch.equal(got, wanted)
        past.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.equal(generate(model, mask, past_key_values=past), wanted)


@torch.no_grad()
def test_a_compiled_model(device):
    """Between the compiled parts, tensors come without what says whose they are, or with it."""
    model = make_model("Llama").to(device)
    mask = mask_of(0, device)
    wanted = generate(model, mask)
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    plain, compiled.forward = compiled.forward, torch.compile(compiled.forward, backend="aot_eager")
    with VirtualCache(compiled.config, max_length=64) as past:
        assert torch.equal(generate(compiled, mask, past_key_values=past), wanted)
        past.reset()
        plain(prompt(2).to(device), past_key_values=past)  # whose attention is seen to be vattn's
        past.crop(-1)
        logits = compiled(prompt(2)[:, -1:].to(device), past_key_values=past).logits
    torch._dynamo.reset()
    torch.testing.assert_close(logits[:, -1], model(prompt(2).to(device)).logits[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("look", ["keys", "kv_cache", "next update", "other attention", "nobody's attention", "crop"])
def test_whoever_looks_before_the_attention_finds_the_row(look, device, monkeypatch):
    """Between ``update`` and the attention that would write its row."""
    model = make_model("Llama").to(device)
    tokens = prompt(2).to(device)
    with VirtualCache(model.config, max_length=64) as past:
        model(tokens, past_key_values=past)
        k, v = (torch.randn(2, 2, 1, 16, device=device) for _ in range(2))
        keys, values = past.update(k, v, 0)
        assert not torch.equal(keys[:, :, -1:], k)  # the attention's to write
        end = tokens.shape[1] + 1
        if look == "keys":
            keys, values = past.layers[0].keys, past.layers[0].values
        elif look == "kv_cache":
            keys, values = (past.kv_cache.k(0)[:2, :end].transpose(1, 2), past.kv_cache.v(0)[:2, :end].transpose(1, 2))
        elif look == "next update":
            past.update(k, v, 1)
        elif look == "other attention":
            function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["vattn_sdpa"]
            q = torch.randn(2, 4, 1, 16, device=device)
            function(model.model.layers[0].self_attn, q, keys, values, None, scaling=0.25)
        elif look == "nobody's attention":  # an update that attention never follows, then another cache's
            DynamicCache = transformers.DynamicCache
            model(tokens, past_key_values=DynamicCache(config=model.config))
        else:
            past.crop(end)
        assert torch.equal(keys[:, :, -1:], k)
        assert torch.equal(values[:, :, -1:], v)


@torch.no_grad()
def test_rows_wait_for_nobody_else(device):
    """Where the model's attention is no longer vattn's, and where a cache ends with a row that was never written."""
    model = make_model("Llama").to(device)
    tokens = prompt(2).to(device)
    k, v = (torch.randn(2, 2, 1, 16, device=device) for _ in range(2))
    with VirtualCache(model.config, max_length=64) as past:
        model(tokens, past_key_values=past)
        model.config._attn_implementation = "sdpa"
        keys, _ = past.update(k, v, 0)
        assert torch.equal(keys[:, :, -1:], k)
    model.config._attn_implementation = "sdpa"
    past = VirtualCache(model.config, max_length=64)
    model(tokens, past_key_values=past)
    past.update(k, v, 0)
    past.close()
    with VirtualCache(model.config, max_length=64) as past:  # as if nothing had been
        model(tokens, past_key_values=past)


@torch.no_grad()
def test_beams_and_steps_back(device):
    """Rows change places under the launches' addresses, and ``crop`` takes tokens away."""
    model = make_model("Llama").to(device)
    mask = mask_of(2, device)
    with VirtualCache(model.config, max_length=64) as past:
        got = generate(model, mask, past_key_values=past, num_beams=3)
    assert torch.equal(got, generate(model, mask, num_beams=3))
    with VirtualCache(model.config, max_length=64) as past:
        tokens = prompt(1).to(device)
        model(tokens[:, :-1], past_key_values=past)
        first = model(tokens[:, -1:], past_key_values=past).logits
        past.crop(-1)
        second = model(tokens[:, -1:], past_key_values=past).logits
        torch.testing.assert_close(second, first, rtol=0, atol=0)
