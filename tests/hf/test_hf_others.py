"""A model whose ``VirtualCache`` is open, in the hands of everybody else: nothing about it is other than before."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import MAX_LENGTH, close, logits, make_model, prompt, with_cache  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from vattn.hf import VirtualCache  # noqa: E402
from vattn.hf import attention as hf_attention  # noqa: E402

NAMES = ["Llama", "Mistral, window 16", "Gemma 2"]  # the last on eager attention
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(params=NAMES)
def model(request):
    return make_model(request.param)


@pytest.fixture
def opened(model):
    """In use: one turn is behind it, and one ended on the way."""
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        model.generate(prompt(2), **OPTIONS, **with_cache(past))
        hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, prompt(2)[:, :1], past)
        hook.remove()
        yield past


def test_other_caches(model):
    wanted = model.generate(prompt(2), **OPTIONS)
    scores = logits(model, prompt(2))
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        logits(model, prompt(2), past)
        for options in ({}, {"cache_implementation": "static"}, with_cache(DynamicCache(config=model.config))):
            assert torch.equal(model.generate(prompt(2), **OPTIONS, **options), wanted)
            assert torch.equal(logits(model, prompt(2)), scores)


def test_the_config(model, tmp_path):
    name, before, printed = model.config._attn_implementation, model.config.to_dict(), repr(model.config)
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        seen = []
        hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: seen.append(repr(model.config)))
        logits(model, prompt(2), past)
        hook.remove()
        assert seen == [printed]  # in the pass as well
        assert model.config.to_dict() == before
        for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
            assert config._attn_implementation == name
            assert config.to_dict() == before
        model.save_pretrained(tmp_path)
        other = AutoModelForCausalLM.from_config(model.config)
        assert other.config._attn_implementation == name
        model.set_attn_implementation("eager")
        close(logits(model, prompt(2)[:, :1], past), logits(model, torch.cat([prompt(2), prompt(2)[:, :1]], 1))[:, -1:])
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
    close(logits(again, prompt(2)), logits(model, prompt(2)))


def test_a_model_copied_while_a_cache_is_open(model, opened):
    other = copy.deepcopy(model)
    close(logits(other, prompt(2)), logits(model, prompt(2)))
    with VirtualCache(other.config, max_length=MAX_LENGTH) as past:
        close(logits(other, prompt(2), past), logits(model, prompt(2)))


def test_compiled_in_one_piece(model, opened):
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    close(logits(compiled, prompt(2)), logits(model, prompt(2)))
    torch._dynamo.reset()


@pytest.mark.slow
def test_batched_continuously():
    """``generate_batch`` and its paged cache."""
    model = make_model("Llama")
    texts = [row.tolist() for row in prompt(2)]
    generation = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    size = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    wanted = model.generate(prompt(2), max_new_tokens=6, do_sample=False)[:, 11:].tolist()
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        logits(model, prompt(2), past)
        found = model.generate_batch(
            inputs=texts, generation_config=generation, continuous_batching_config=size, progress_bar=False
        )
        paged = model.generate(prompt(2), **OPTIONS, cache_implementation="paged")
    assert [found[key].generated_tokens for key in sorted(found)] == wanted
    assert torch.equal(paged.view(2, -1), model.generate(prompt(2), **OPTIONS))


def test_two_threads_of_one_model(model):
    """Each with a cache of its own, one of them transformers'."""
    wanted = model.generate(prompt(2), **OPTIONS)

    def run(virtual: bool) -> torch.Tensor:
        for _ in range(4):
            if not virtual:
                out = model.generate(prompt(2), **OPTIONS)
                continue
            with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
                out = model.generate(prompt(2), **OPTIONS, **with_cache(past))
        return out

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, [True, False] * 2):
            assert torch.equal(found, wanted)


def test_a_function_registered_before_vattn_was_imported():
    """It is called, with K, V and the mask as any cache would give them."""
    code = """
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
calls = []
def mine(module, q, k, v, mask, **options):
    calls.append(k.shape[2])
    return sdpa_attention_forward(module, q, k, v, mask, **options)
AttentionInterface.register("sdpa", mine)
from helpers.hf_models import logits, make_model, prompt
from vattn.hf import VirtualCache
model = make_model("Llama")
mask = torch.ones(2, 11, dtype=torch.long)
mask[0, :4] = 0
wanted = logits(model, prompt(2), attention_mask=mask)
with VirtualCache(model.config, max_length=32) as past:
    found = logits(model, prompt(2), past, attention_mask=mask)
assert calls == [11] * 8, calls
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=120)


def test_an_eager_attention_that_is_not_the_usual_one(monkeypatch):
    """vattn tries it, finds another result than its own, and leaves it to the model."""
    model = make_model("Gemma 2")
    code = sys.modules[type(model).__module__]
    original = code.eager_attention_forward

    def twice(*args, **kwargs):
        out, weights = original(*args, **kwargs)
        return 2 * out, weights

    twice.__module__ = original.__module__  # as if it were transformers' own
    monkeypatch.setattr(code, "eager_attention_forward", twice)
    attended = []
    monkeypatch.setattr(hf_attention, "_attend", lambda *args: attended.append(args))
    wanted = model.generate(prompt(2), **OPTIONS)
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        assert torch.equal(model.generate(prompt(2), **OPTIONS, **with_cache(past)), wanted)
    assert not attended


@torch.no_grad()
def test_compiled_layers_and_padding():
    """Parts of a model compiled, the rest not: masks go from one to the other."""
    model = make_model("Llama")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    wanted = model.generate(prompt(2), attention_mask=mask, **OPTIONS)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        found = model.generate(prompt(2), attention_mask=mask, **OPTIONS, **with_cache(past))
    torch._dynamo.reset()
    assert torch.equal(found, wanted)
