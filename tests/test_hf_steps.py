"""Decode steps of a ``VirtualCache`` by vattn's own launches; without a GPU through Triton's interpreter."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import textwrap
import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
from hf_models import make_model, prompt  # noqa: E402

from vattn.attention import uniform_step  # noqa: E402
from vattn.hf import VirtualCache, storage  # noqa: E402
from vattn.hf.model_code import looks_attention_up, reader_of  # noqa: E402

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


def launches(calls):
    """How many of the calls appended."""
    return sum(options.get("new") is not None for options in calls)


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
    assert launches(calls) == len(calls) == (NEW_TOKENS - 1) * model.config.num_hidden_layers
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
        assert torch.equal(generate(model, mask, past_key_values=past), wanted)
    assert not launches(calls)


@torch.no_grad()
@pytest.mark.parametrize("whose", ["module", "class"])
def test_a_forward_replaced_on_the_way(whose, device, monkeypatch):
    """By one that reads the newest row between ``update`` and the attention."""
    model = make_model("Llama").to(device)
    code = sys.modules[type(model).__module__]
    source = textwrap.dedent(inspect.getsource(code.LlamaAttention.forward))
    update = "key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)"
    assert update in source
    source = source.replace(update, update + "; query_states = query_states + key_states[:, :1, -1:].sum()")
    namespace = dict(vars(code))
    exec(source, namespace)
    forward = namespace["forward"]

    def steps(past):
        logits = [model(prompt(2).to(device), past_key_values=past).logits[:, -1]]
        with monkeypatch.context() as patch:
            for number in range(3):
                if number == 1 and whose == "class":
                    patch.setattr(code.LlamaAttention, "forward", forward)
                elif number == 1:
                    for layer in model.model.layers:
                        patch.setattr(layer.self_attn, "forward", partial(forward, layer.self_attn), raising=False)
                token = logits[0].argmax(-1, keepdim=True)
                logits.append(model(token, past_key_values=past).logits[:, -1])
        return logits

    wanted = steps(transformers.DynamicCache(config=model.config))
    calls = count(monkeypatch, "attend", uniform_step.UniformStep.attend)
    with VirtualCache(model.config, max_length=64) as past:
        for found, right in zip(steps(past), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
    assert launches(calls) == model.config.num_hidden_layers
    assert len(calls) == 3 * launches(calls)


@torch.no_grad()
def test_another_config_of_the_same_model(device):
    """Two caches switch two configs; when the model's own is back to its attention, no row waits for vattn's."""
    model = make_model("Llama").to(device)
    tokens = prompt(2).to(device)

    def steps(past, close=lambda: None):
        logits = [model(tokens, past_key_values=past).logits[:, -1]]
        for number in range(3):
            if number == 1:
                close()
            logits.append(model(tokens[:, :1], past_key_values=past).logits[:, -1])
        return logits

    wanted = steps(transformers.DynamicCache(config=model.config))
    first = VirtualCache(model.config, max_length=64)
    with VirtualCache(copy.deepcopy(model.config), max_length=64) as second:
        for found, right in zip(steps(second, first.close), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def _tells(self, q, k, v, past):
    if past is not None:
        k, v = past.update(k, v, 0)
    attention_interface = self.function
    return attention_interface(self, q, k, v, None)


def _reads_at_once(self, q, k, v, past):
    attention_interface = self.function
    k, v = past.update(k, v, 0); q = q + k  # fmt: skip # noqa: E702
    return attention_interface(self, q, k, v, None)


def _reads_elsewhere(self, q, k, v, past):
    attention_interface = self.function
    k, v = past.update(k, v, 0)
    if q.shape[2] > 1:
        return attention_interface(self, q, k, v, None)
    return torch.softmax(q @ k.mT, -1) @ v


def test_what_the_source_of_a_model_says():
    def found(name, family):
        code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        return reader_of(getattr(code, f"{name}Attention").forward)

    for name, family in (("Llama", "llama"), ("Gemma2", "gemma2"), ("GptOss", "gpt_oss"), ("Qwen3", "qwen3")):
        assert found(name, family).co_name == "forward"
    for name, family in (("Doge", "doge"), ("Falcon", "falcon"), ("DeepseekV3", "deepseek_v3")):
        assert found(name, family) is None
    assert reader_of(torch.nn.Linear.forward) is None
    assert reader_of(_tells).co_name == "_tells"
    assert reader_of(_reads_at_once) is reader_of(_reads_elsewhere) is None
    for name in ("Doge", "DeepseekV32"):
        assert not looks_attention_up(getattr(transformers, f"{name}Config")())
    for name in ("Llama", "Gemma2", "GptOss", "Phi3"):
        assert looks_attention_up(getattr(transformers, f"{name}Config")())


def test_out_of_memory_once(device, monkeypatch):
    """Another kernel may do; the next step has its own again."""
    model = make_model("Llama").to(device)
    mask = mask_of(0, device)
    wanted, attend, failed = generate(model, mask), uniform_step.UniformStep.attend, []

    def fails_once(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        return attend(*args, **kwargs)

    calls = count(monkeypatch, "attend", fails_once)
    with VirtualCache(model.config, max_length=64) as past, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(generate(model, mask, past_key_values=past), wanted)
    assert launches(calls) == (NEW_TOKENS - 1) * model.config.num_hidden_layers


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
