"""Decode steps of a ``VirtualCache`` by vattn's own launches; without a GPU through Triton's interpreter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
from helpers.hf_models import make_model, prompt, with_cache  # noqa: E402

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
        calls.append(kwargs)
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


@pytest.mark.parametrize("padding", [4, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["Llama", "Mistral, window 16", "Qwen3", "Gemma 2", "GPT-OSS"])
def test_the_default_cache_s_tokens(name, padding, device, monkeypatch):
    model = make_model(name).to(device)
    mask = mask_of(padding, device)
    wanted = generate(model, mask)
    appended = count(monkeypatch, "append", uniform_step.UniformStep.append)
    calls = count(monkeypatch, "attend", uniform_step.UniformStep.attend)
    with VirtualCache(model.config, max_length=64) as past:
        got = generate(model, mask, **with_cache(past))
        past.kv_cache.check_integrity()
    assert len(appended) == len(calls) == (NEW_TOKENS - 1) * model.config.num_hidden_layers
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("which", ["append", "attend"])
def test_a_machine_on_which_they_do_not_work(which, device, monkeypatch):
    """No compiler, say: one warning, and torch's operations from there on."""
    model = make_model("Llama").to(device)
    mask = mask_of(3, device)
    wanted = generate(model, mask)

    def fail(*_args, **_kwargs):
        raise RuntimeError("no C compiler was found")

    monkeypatch.setattr(uniform_step.UniformStep, which, fail)
    with VirtualCache(model.config, max_length=64) as past:
        with pytest.warns(UserWarning, match="no C compiler") as noted:
            got = generate(model, mask, **with_cache(past))
        assert len([each for each in noted if "vattn" in str(each.message)]) == 1
        assert torch.equal(got, wanted)
        past.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.equal(generate(model, mask, **with_cache(past)), wanted)


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
        assert torch.equal(generate(compiled, mask, **with_cache(past)), wanted)
        past.reset()
        plain(prompt(2).to(device), **with_cache(past))  # whose attention is seen to be vattn's
        past.crop(-1)
        logits = compiled(prompt(2)[:, -1:].to(device), **with_cache(past)).logits
    torch._dynamo.reset()
    torch.testing.assert_close(logits[:, -1], model(prompt(2).to(device)).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_model_that_reads_what_update_returned(device, monkeypatch):
    """Doge makes its mask of the values, newest row included."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        keep_window_size=4,
        initializer_range=0.25,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.DogeForCausalLM(config).eval().to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.normal_()
    mask = mask_of(0, device)
    calls = count(monkeypatch, "attend", uniform_step.UniformStep.attend)
    wanted = generate(model, mask)
    with VirtualCache(config, max_length=64) as past:
        assert torch.equal(generate(model, mask, **with_cache(past)), wanted)
    assert not calls


@pytest.mark.parametrize("which", ["append", "attend"])
def test_out_of_memory_once(which, device, monkeypatch):
    """Another kernel may do; the next step has its own again."""
    model = make_model("Llama").to(device)
    mask = mask_of(0, device)
    wanted, launch, failed = generate(model, mask), getattr(uniform_step.UniformStep, which), []

    def fails_once(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        return launch(*args, **kwargs)

    calls = count(monkeypatch, which, fails_once)
    with VirtualCache(model.config, max_length=64) as past, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(generate(model, mask, **with_cache(past)), wanted)
    assert len(calls) == (NEW_TOKENS - 1) * model.config.num_hidden_layers


@torch.no_grad()
def test_beams_and_steps_back(device):
    """Rows change places under the launches' addresses, and ``crop`` takes tokens away."""
    model = make_model("Llama").to(device)
    mask = mask_of(2, device)
    with VirtualCache(model.config, max_length=64) as past:
        got = generate(model, mask, **with_cache(past), num_beams=3)
    assert torch.equal(got, generate(model, mask, num_beams=3))
    with VirtualCache(model.config, max_length=64) as past:
        tokens = prompt(1).to(device)
        model(tokens[:, :-1], **with_cache(past))
        first = model(tokens[:, -1:], **with_cache(past)).logits
        past.crop(-1)
        second = model(tokens[:, -1:], **with_cache(past)).logits
        torch.testing.assert_close(second, first, rtol=0, atol=0)
