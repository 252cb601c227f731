"""What a ``VirtualCache`` refuses, and that it refuses before a wrong token."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import MAX_LENGTH, checked_cache, close, logits, make_model, prompt, with_cache  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from vattn import ConfigError, OutOfPages  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


@pytest.fixture
def past(model):
    with checked_cache(model) as past:
        yield past


# -- what is refused -------------------------------------------------------------------------------------------------
def test_a_cache_shorter_than_the_request(model):
    with VirtualCache(model.config, max_length=14) as past:
        with pytest.raises(ConfigError, match=r"needs 15 tokens of cache, max_length is 14: make"):
            model.generate(prompt(2), **with_cache(past), max_new_tokens=10, do_sample=False)
        past.reset()
        with pytest.raises(ConfigError, match="needs 20 tokens"):
            logits(model, prompt(1, length=20), past)


def test_memory_shorter_than_the_request(model):
    with VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=4096, memory_limit=8 * 4096) as past:
        with pytest.raises(OutOfPages, match="memory_limit"):
            logits(model, prompt(2, length=100), past)
        past.reset()
        close(logits(model, prompt(2), past), logits(model, prompt(2)))


def test_another_batch_size(model, past):
    logits(model, prompt(2), past)
    with pytest.raises(ConfigError, match=r"holds a batch of 2, got a batch of 3: call reset\(\)"):
        logits(model, prompt(3), past)
    close(logits(model, prompt(2, seed=2), past), logits(model, torch.cat([prompt(2), prompt(2, seed=2)], 1))[:, 11:])


def test_another_model(model, past):
    logits(model, prompt(2), past)
    wider = make_model("Llama", head_dim=24)
    with pytest.raises(ConfigError, match=r"layer 0 has .*head_dim=16.*got .*head_dim=24.*another model"):
        logits(wider, prompt(2), past)
    deeper = make_model("Llama", num_hidden_layers=6)
    past.reset()
    with pytest.raises(ConfigError, match="a model of 4 layers, got layer 4"):
        logits(deeper, prompt(2), past)
    past.reset()
    shallow = make_model("Llama", num_hidden_layers=2)
    logits(shallow, prompt(2), past)
    with pytest.raises(ConfigError, match=r"layers \[2, 3\] hold another number of tokens"):
        logits(model, prompt(2), past)
    with (
        VirtualCache(model.config, max_length=64) as fresh,
        pytest.raises(ConfigError, match=r"layers \[2, 3\] hold another number"),
    ):
        shallow.generate(prompt(2), **with_cache(fresh), max_new_tokens=3)


def test_another_dtype_or_device(model):
    half = make_model("Llama").to(torch.bfloat16)
    with VirtualCache(model.config, max_length=32, dtype=torch.bfloat16) as past:
        with pytest.raises(ConfigError, match=r"in torch.float32, this cache was made for dtype=torch.bfloat16"):
            logits(model, prompt(1), past)
        logits(half, prompt(1), past)
    with VirtualCache(model.config, max_length=32) as past:
        logits(model, prompt(1), past)
        with pytest.raises(ConfigError, match=r"holds torch.float32, got torch.bfloat16"):
            logits(half, prompt(1), past)
    with (
        VirtualCache(model.config, max_length=32, device="cuda") as past,
        pytest.raises(ConfigError, match="the model is on cpu, this cache was made for device=cuda"),
    ):
        logits(model, prompt(1), past)


def test_gradients_of_v_alone(past, model):
    draw = torch.randn(2, 2, 3, 16)
    with pytest.raises(ConfigError, match="record gradients"):
        past.update(draw, draw.clone().requires_grad_(), 0)


def test_gradients(model, past):
    with pytest.raises(ConfigError, match=r"torch.no_grad\(\), or train with use_cache=False"):
        model(prompt(1), **with_cache(past))
    model.train()
    try:
        with pytest.raises(ConfigError, match="record gradients"):
            model(prompt(1), **with_cache(past), labels=prompt(1))
    finally:
        model.eval()
    assert past.get_seq_length() == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (((torch.zeros(1), torch.zeros(1)),), "tuples of K and V are not supported"),
        (None, "config must be a model's config, as model.config; got NoneType"),
        (transformers.T5Config(), "T5Config is an encoder-decoder"),
        (transformers.MambaConfig(), "no attention layers|takes no cache of this kind"),
        (transformers.xLSTMConfig(), "no attention layers|takes no cache of this kind"),
        (transformers.RwkvConfig(), "RwkvForCausalLM takes no cache of this kind: use the cache that transformers"),
        (transformers.XLNetConfig(), "take no cache of this kind"),
        (transformers.OpenAIGPTConfig(), "take no cache of this kind"),
        (transformers.Zamba2Config(), "keeps more than K and V: use the cache that transformers gives"),
        (transformers.models.mllama.MllamaTextConfig(), "attend to images"),
        (transformers.LlamaConfig(vocab_size=9, rope_parameters=None, max_position_embeddings=8), None),
    ],
)
def test_what_is_no_config_of_a_decoder(config, message):
    if message is None:  # one that is
        VirtualCache(config).close()
        return
    with pytest.raises(ConfigError, match=message):
        VirtualCache(config, max_length=8)


class OfOnesOwnConfig(transformers.LlamaConfig):
    model_type = "of_ones_own"


class OfOnesOwn(transformers.LlamaForCausalLM):
    config_class = OfOnesOwnConfig

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@torch.no_grad()
def test_a_model_that_hands_the_cache_on_by_name_only():
    transformers.AutoConfig.register("of_ones_own", OfOnesOwnConfig)
    transformers.AutoModelForCausalLM.register(OfOnesOwnConfig, OfOnesOwn)
    shape = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    model = OfOnesOwn(OfOnesOwnConfig(vocab_size=97, **shape)).eval()
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        close(logits(model, prompt(2), past), logits(model, prompt(2)))


def test_a_config_that_wants_no_cache():
    with pytest.warns(UserWarning, match="use_cache=False"), VirtualCache(transformers.LlamaConfig(use_cache=False)):
        pass


def test_hybrids_and_what_they_were_not_made_for():
    model = make_model("Qwen3-Next")
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        logits(model, prompt(2), past)
        with pytest.raises(ConfigError, match=r"holds a batch of 2, got a batch of 3: call reset\(\)"):
            logits(model, prompt(3), past)
        past.reset()
        close(logits(model, prompt(3), past), logits(model, prompt(3)))
        past.reset()
        with pytest.raises(ConfigError, match="has no K and V"):
            logits(make_model("Llama"), prompt(1), past)
        with pytest.raises(ConfigError, match="prefill another"):
            copy.deepcopy(past)


def test_a_length_for_which_there_are_no_addresses(model):
    refused = pytest.raises(ConfigError, match=r"batch of 2 \(and a spare slot\) with max_length=1125899906842624")
    with VirtualCache(model.config, max_length=1 << 50) as past, refused:
        logits(model, prompt(2), past)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 2.5}, "max_length must be"),
        ({"attention": "flash"}, "unknown attention backend 'flash'"),
        ({"attention": "flash-attn-3"}, "reads past the end"),
    ],
)
def test_wrong_arguments(model, options, message):
    with pytest.raises(ConfigError, match=message):
        VirtualCache(model.config, **options)


def test_an_attention_that_cannot_do_it(monkeypatch):
    model = make_model("GPT-OSS")
    with (
        VirtualCache(model.config, max_length=32, attention="sdpa") as past,
        pytest.raises(ConfigError, match="attention 'sdpa' cannot be used here: has no sinks"),
    ):
        logits(model, prompt(1), past)


def test_after_close(model):
    past = VirtualCache(model.config, max_length=32)
    logits(model, prompt(1), past)
    past.close()
    past.close()
    for use in (lambda: logits(model, prompt(1), past), past.stats, past.reset, lambda: past.crop(-1)):
        with pytest.raises(ConfigError, match="this VirtualCache is closed"):
            use()


def test_an_attention_named_for_a_model_that_has_its_own():
    """It shows with the second layer: the first one's K and V went to no attention that vattn could be in."""
    model = make_model("Falcon")
    with (
        VirtualCache(model.config, attention="sdpa") as past,
        pytest.raises(ConfigError, match="'sdpa' was not asked for: this model computes its own"),
    ):
        logits(model, prompt(1), past)


def test_autocast(model, past):
    with torch.autocast("cpu", torch.bfloat16):
        wanted = logits(model, prompt(2), DynamicCache(config=model.config))
        got = logits(model, prompt(2), past)
    assert past.kv_cache.layout.dtype == torch.bfloat16
    assert (got - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_pickling_and_copying(model, past):
    with pytest.raises(ConfigError, match=r"cannot be pickled; copy.deepcopy"):
        pickle.dumps(past)
    logits(model, prompt(1), past)
    with copy.copy(past) as other:
        assert other.layers[0].keys.data_ptr() != past.layers[0].keys.data_ptr()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 2, 1, 16), None), ((2, 1, 3, 16), None), ((1, 2, 3, 16), None), (None, torch.bfloat16)]
)
def test_v_that_does_not_fit_k_at_any_time(model, past, shape, dtype):
    k = torch.randn(2, 2, 3, 16)
    past.update(k, torch.randn_like(k), 0)
    past.reset()
    with pytest.raises(ConfigError, match="K and V must agree"):
        past.update(k, torch.zeros(shape or k.shape, dtype=dtype), 0)
    past.update(k, torch.randn_like(k), 0)


@pytest.mark.parametrize(
    ("option", "value"), [("device", "quantum"), ("memory_limit", "1GiB"), ("page_bytes", "x"), ("dtype", "float32")]
)
def test_wrong_options_are_refused_at_once(model, option, value):
    with pytest.raises(ConfigError, match=option):
        VirtualCache(model.config, **{option: value})


@torch.no_grad()
def test_one_row_and_then_a_batch(model, past):
    """The message names what would do."""
    logits(model, prompt(1), past)
    text = torch.cat([prompt(1).repeat(3, 1), prompt(3, seed=4)], dim=1)
    with pytest.raises(ConfigError, match=r"holds a batch of 1, got a batch of 3: call batch_repeat_interleave\(3\)"):
        model.generate(text, max_new_tokens=4, do_sample=False, **with_cache(past))
    past.batch_repeat_interleave(3)
    found = model.generate(text, max_new_tokens=4, do_sample=False, **with_cache(past))
    assert torch.equal(found, model.generate(text, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BertConfig(), r"BertConfig says is_decoder=False.*set is_decoder=True"),
        (transformers.EsmConfig(), "is_decoder=False"),
        (transformers.ViTConfig(), "ViTConfig is of models that take no cache"),
        (transformers.CLIPTextConfig(), "take no cache"),
        (transformers.ModernBertConfig(), "take no cache"),
        (transformers.LlamaConfig(is_causal=False), "LlamaConfig says is_causal=False"),
        (transformers.GPT2Config(add_cross_attention=True), "add_cross_attention=True"),
        (transformers.BertConfig(is_decoder=True), None),
        (transformers.GPTNeoXConfig(), None),
    ],
)
def test_what_attends_otherwise_than_a_decoder(config, message):
    if message is None:
        VirtualCache(config, max_length=8).close()
        return
    with pytest.raises(ConfigError, match=message):
        VirtualCache(config, max_length=8)


class SaysCacheConfig(transformers.LlamaConfig):
    model_type = "says_cache"


class SaysCache(transformers.LlamaForCausalLM):
    config_class = SaysCacheConfig

    def forward(self, input_ids, cache=None, **others):
        return super().forward(input_ids, **with_cache(cache), **others)


class HandsOn(SaysCache):
    def forward(self, input_ids, **others):
        return super().forward(input_ids, others.pop("cache", None), **others)


@pytest.mark.parametrize("kind", [SaysCache, HandsOn])
@torch.no_grad()
def test_a_registered_model_of_a_user_s_own(kind):
    transformers.AutoConfig.register("says_cache", SaysCacheConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(SaysCacheConfig, kind, exist_ok=True)
    shape = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    model = kind(SaysCacheConfig(vocab_size=97, **shape)).eval()
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        for tokens in (prompt(2), prompt(2)[:, :1]):
            found = model(tokens, cache=past).logits
    close(found, model(torch.cat([prompt(2), prompt(2)[:, :1]], 1)).logits[:, -1:])
