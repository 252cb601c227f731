"""``VirtualCache`` and a user's own code in a model of transformers': it is called, and given what any cache gives."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

transformers = pytest.importorskip("transformers")
from helpers.hf_models import CACHE, MAX_LENGTH, close, logits, make_model, prompt, with_cache  # noqa: E402
from transformers import AttentionInterface, DynamicCache  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from vattn import ConfigError  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402

MASK = torch.ones(2, 11, dtype=torch.long)
MASK[0, :6] = 0


def llama(attention: str = "sdpa"):
    model = make_model("Llama")
    model.config._attn_implementation = attention
    return model


def generate(model, **options):
    return model.generate(prompt(2), attention_mask=MASK, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_function_in_the_place_of_transformers_own(attention, monkeypatch):
    """As whoever steers or knocks out heads puts it there, before the cache is made or after."""
    model = llama(attention)
    plain = generate(model)
    if attention == "eager":
        original = modeling_llama.eager_attention_forward
    else:
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def without_a_head(*args, **kwargs):
        out, weights = original(*args, **kwargs)
        return out.index_fill(2, torch.tensor([0]), 0.0), weights

    def replace(function):
        if attention == "eager":
            monkeypatch.setattr(modeling_llama, "eager_attention_forward", function)
        else:
            AttentionInterface.register("sdpa", function)

    try:
        for early in (True, False):
            with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
                if early:
                    replace(without_a_head)
                else:  # one turn is vattn's before
                    assert torch.equal(generate(model, **with_cache(past)), plain)
                    past.reset()
                    replace(without_a_head)
                wanted = generate(model)
                assert not torch.equal(wanted, plain)
                assert torch.equal(generate(model, **with_cache(past)), wanted)
                replace(original)
                past.reset()
                assert torch.equal(generate(model, **with_cache(past)), plain)
    finally:
        replace(original)


class OwnAttention(modeling_llama.LlamaAttention):
    """Looks nothing up, and leaves a mask out that masks nothing."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **others):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if (past := others[CACHE]) is not None:
            k, v = past.update(k, v, self.layer_idx)
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        causal = attention_mask is None and q.shape[2] > 1
        out = scaled_dot_product_attention(q, k, v, attention_mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("where", [slice(None), slice(2, 3)], ids=["everywhere", "in one layer"])
def test_an_attention_module_that_looks_nothing_up(where):
    model = llama()
    for layer in model.model.layers[where]:
        layer.self_attn.__class__ = OwnAttention
    wanted = generate(model)
    for attention in ("auto", None):
        with VirtualCache(model.config, max_length=MAX_LENGTH, attention=attention) as past:
            assert torch.equal(generate(model, **with_cache(past)), wanted)


def test_an_attention_module_that_looks_it_up(monkeypatch):
    """A user's, in a file of his own."""
    model = llama()
    namespace = dict(vars(modeling_llama))
    source = """
class Mine(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **others):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = function(self, q, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(out.flatten(2)), weights
"""
    exec(compile(source.replace("past_key_values", CACHE), "mine.py", "exec"), namespace)
    for layer in model.model.layers:
        layer.self_attn.__class__ = namespace["Mine"]
    wanted = generate(model)
    calls = []
    monkeypatch.setattr(sys.modules["vattn.hf.attention"], "_attend", _counted(calls))
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        assert torch.equal(generate(model, **with_cache(past)), wanted)
    assert len(calls) == 8 * model.config.num_hidden_layers


def _counted(calls):
    original = sys.modules["vattn.hf.attention"]._attend

    def counted(*args):
        calls.append(args)
        return original(*args)

    return counted


@torch.no_grad()
def test_update_by_hand():
    """After a pass that was given something for a mask, and of as many tokens: from anywhere, as any cache's."""
    model = llama()
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        logits(model, prompt(2), past)
        for layer in range(model.config.num_hidden_layers):
            keys, _ = past.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), layer)
            assert keys.shape == (2, 2, 12, 16)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_weights_that_the_config_asks_for(attention):
    model = llama(attention)
    model.config.output_attentions = attention == "eager"
    wanted = model(prompt(2), attention_mask=MASK, output_attentions=attention == "eager").attentions
    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        found = model(prompt(2), attention_mask=MASK, **with_cache(past)).attentions
    if attention == "sdpa":
        assert not found
    else:
        assert len(found) == model.config.num_hidden_layers
        for one, other in zip(found, wanted, strict=True):
            close(one, other)


def test_models_of_fewer_layers_than_the_config_counts():
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}
    config = transformers.BartConfig(
        vocab_size=97, d_model=64, encoder_layers=5, decoder_layers=3, max_position_embeddings=100, **heads, **ends
    )
    torch.manual_seed(0)
    model = transformers.BartForCausalLM(config).eval()
    text = prompt(2)
    with VirtualCache(model.config, max_length=60) as past:
        default = DynamicCache(config=model.config)
        for tokens in (text, text[:, :1]):
            close(logits(model, tokens, past), logits(model, tokens, default))
    model = llama()
    model.model.layers = model.model.layers[:2]
    with VirtualCache(model.config, max_length=60) as past:
        logits(model, text, past)
        with pytest.raises(ConfigError, match="num_hidden_layers"):
            logits(model, text[:, :1], past)
