"""``VirtualCache`` as a ``transformers.Cache``: what the documentation says of caches, and what must be refused."""

from __future__ import annotations

import copy
import gc
import random
from itertools import pairwise

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import CACHE, MAX_LENGTH, checked_cache, close, logits, make_model, prompt, with_cache  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from vattn import CacheStats  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402
from vattn.hf import attention as hf_attention  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


@pytest.fixture(scope="module")
def windowed():
    return make_model("Mistral, window 16")


@pytest.fixture
def past(model):
    with checked_cache(model) as past:
        yield past


# -- what a cache does -----------------------------------------------------------------------------------------------
def test_attention_both_ways():
    """What is passed on sees the mask that it would have seen: a prompt's tokens see those after them here."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, **heads}
    config = transformers.GemmaConfig(**shape, use_bidirectional_attention=True, initializer_range=0.15)
    model = transformers.GemmaForCausalLM(config).eval()
    text, new = prompt(2), prompt(2, seed=2)[:, :1]
    default = DynamicCache(config=config)
    with VirtualCache(config, max_length=MAX_LENGTH) as past:
        for tokens in (text, new, new):
            close(logits(model, tokens, past), logits(model, tokens, default))
    causal = logits(model, text[:, :5])
    assert (logits(model, text)[:, :5] - causal).abs().max() > 0.1


@pytest.mark.parametrize("ends", [(11,), (3, 4, 5, 6, 11)], ids=["whole", "in chunks"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_recurrent_layers_see_of_padding(attention, ends):
    """What attention computes for padding goes on into the next tokens' states."""
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "lru_width": 64}
    config = transformers.RecurrentGemmaConfig(
        **shape, num_attention_heads=4, num_key_value_heads=1, attention_window_size=16
    )
    model = transformers.RecurrentGemmaForCausalLM._from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    text = torch.cat([prompt(2), prompt(2)[:, :2]], dim=1)
    ends = [0, *ends, 12, 13]
    given = [(text[:, start:end], mask[:, :end]) for start, end in pairwise(ends)]
    default = DynamicCache(config=config)  # one text after the other: this model has a state of its own
    wanted = [logits(model, tokens, default, attention_mask=seen) for tokens, seen in given]
    with VirtualCache(config, max_length=MAX_LENGTH) as past:
        got = [logits(model, tokens, past, attention_mask=seen) for tokens, seen in given]
    for one, other, (tokens, seen) in zip(got, wanted, given, strict=True):
        real = seen[:, -tokens.shape[1] :].bool()
        close(one[real], other[real])


def test_before_and_after_the_first_use(model, past):
    assert isinstance(past, transformers.Cache)
    assert (len(past), past.get_seq_length(), past.batch_size, past.is_initialized) == (4, 0, -1, False)
    assert past.kv_cache is None
    assert past.stats() == CacheStats(**dict.fromkeys(past.stats().as_dict(), 0))
    assert past.layers[0].keys is None
    logits(model, prompt(3), past)
    assert (past.get_seq_length(), past.batch_size, past.is_initialized) == (11, 3, True)
    assert past.get_max_length() == MAX_LENGTH
    assert past.layers[2].keys.shape == past.layers[2].values.shape == (3, 2, 11, 16)
    assert past.kv_cache.stats().num_live_slots == 3
    assert [past.kv_cache.seq_len(slot) for slot in range(3)] == [11, 11, 11]
    assert past.stats().row_bytes == 3 * 11 * past.kv_cache.layout.bytes_per_token
    assert "tokens=11" in repr(past)


def test_addresses_never_change_and_nothing_is_copied(model, past):
    logits(model, prompt(2), past)
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in past.layers]
    for token in range(20):
        logits(model, prompt(2, seed=token, length=1), past)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in past.layers] == addresses
    assert past.layers[1].keys.data_ptr() == past.kv_cache.k(1).data_ptr()
    assert past.stats().num_copy == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral, window 16", "Gemma 2", "GPT-OSS"])
def test_no_mask_and_no_repeated_heads_are_made(monkeypatch, name, padded):
    """Nobody reads a mask's elements, and vattn attends in every layer of every pass."""
    model = make_model(name)
    wanted = model.generate(prompt(2), attention_mask=_mask(padded), max_new_tokens=8, do_sample=False)

    attended, attend = [], hf_attention._attend

    def counted(*args):
        attended.append(attend(*args))
        return attended[-1]

    def never(mask):
        raise AssertionError("made")

    with VirtualCache(model.config, max_length=MAX_LENGTH) as past:
        monkeypatch.setattr(hf_attention, "_attend", counted)
        monkeypatch.setattr(hf_attention.LazyMask, "dense", property(never))
        got = model.generate(
            prompt(2), attention_mask=_mask(padded), max_new_tokens=8, do_sample=False, **with_cache(past)
        )
    assert torch.equal(got, wanted)
    assert len(attended) == 8 * model.config.num_hidden_layers
    assert all(out is not None for out in attended)


def _mask(padded):
    mask = torch.ones(2, 11, dtype=torch.long)
    if padded:
        mask[1, :6] = 0
    return mask


@pytest.mark.parametrize("name", ["Llama", "Mistral, window 16", "GPT-OSS", "Llama 4, chunks"])
def test_chunked_prefill(name):
    model = make_model(name)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0  # its first two chunks are nothing but padding
    whole = logits(model, prompt(2, length=40), DynamicCache(config=model.config), attention_mask=mask)
    with VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=4096) as past:
        parts = []
        for start, end in ((0, 7), (7, 8), (8, 31), (31, 40)):
            parts.append(
                logits(
                    model,
                    prompt(2, length=40)[:, start:end],
                    past,
                    attention_mask=mask[:, :end],
                    position_ids=torch.arange(start, end)[None],
                )
            )
    expected = logits(model, prompt(2, length=40), None, attention_mask=mask, position_ids=torch.arange(40)[None])
    close(torch.cat(parts, dim=1)[1], expected[1])
    close(torch.cat(parts, dim=1)[0, 9:], expected[0, 9:])
    assert whole.shape == expected.shape


def test_generate_with_prefill_in_chunks(model, past):
    wanted = model.generate(prompt(2, length=30), max_new_tokens=12, do_sample=False)
    options = {"max_new_tokens": 12, "do_sample": False, "prefill_chunk_size": 7}
    assert torch.equal(model.generate(prompt(2, length=30), **with_cache(past), **options), wanted)


def test_masks_that_are_not_left_padding_are_honoured(model, past):
    """Right padding, holes and masks of one's own take the model's own attention over the same memory."""
    right = torch.ones(2, 11, dtype=torch.long)
    right[0, 8:] = 0
    holes = torch.ones(2, 11, dtype=torch.long)
    holes[1, [2, 5]] = 0
    square = torch.ones(2, 1, 11, 11, dtype=torch.bool).tril()
    square[:, :, :, 3] = False
    square[:, :, 3, 3] = True
    for mask in (right, holes, square):
        wanted = logits(model, prompt(2), DynamicCache(config=model.config), attention_mask=mask)
        past.reset()
        close(logits(model, prompt(2), past, attention_mask=mask), wanted)


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_crop(kind, request):
    model = request.getfixturevalue(kind)
    tokens = prompt(2, length=40)
    with VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=4096) as past:
        logits(model, tokens, past)
        past.crop(-10)
        assert past.get_seq_length() == past.kv_cache.seq_len(1) == 30
        past.crop(0)
        assert past.get_seq_length() == 30
        past.crop(-5)
        close(logits(model, tokens[:, 25:], past), logits(model, tokens)[:, 25:])
        past.crop(-40)
        assert past.get_seq_length() == 0
        assert past.stats().in_use_bytes == 0
        close(logits(model, tokens, past), logits(model, tokens))


def test_reset_allows_another_batch_size(model, past):
    for rows in (2, 3, 1):
        close(logits(model, prompt(rows), past), logits(model, prompt(rows)))
        past.reset()
        assert past.get_seq_length() == past.stats().row_bytes == 0


def test_rows_of_the_batch_can_be_repeated_selected_and_reordered(model, past):
    default = DynamicCache(config=model.config)
    for cache in (past, default):
        logits(model, prompt(3), cache)
        cache.batch_repeat_interleave(2)
        logits(model, prompt(6, length=2), cache)
        cache.reorder_cache(torch.tensor([5, 0, 0, 3, 2, 1]))
        cache.batch_select_indices(torch.tensor([4, 1, 1]))
    assert past.batch_size == 3
    for layer, other in zip(past.layers, default.layers, strict=True):
        close(layer.keys, other.keys)
        close(layer.values, other.values)
    close(logits(model, prompt(3, seed=4), past), logits(model, prompt(3, seed=4), default))


def test_a_prompt_is_copied_and_continued_in_several_ways(model, past):
    """As transformers' guide does with a system prompt: prefill once, ``copy.deepcopy`` for each request."""
    logits(model, prompt(1), past)
    for seed in (3, 4):
        said = torch.cat([prompt(1), prompt(1, seed=seed, length=5)], dim=1)
        wanted = model.generate(said, max_new_tokens=15, do_sample=False)
        with copy.deepcopy(past) as mine:
            assert mine.layers[0].keys.data_ptr() != past.layers[0].keys.data_ptr()
            assert torch.equal(model.generate(said, **with_cache(mine), max_new_tokens=15, do_sample=False), wanted)
    assert past.get_seq_length() == 11


@pytest.mark.parametrize("attention", ["auto", None])
def test_a_compiled_model(model, attention):
    """A view of far more than is mapped: a copy of all of it would end the process."""
    wanted = model.generate(prompt(2), max_new_tokens=12, do_sample=False)
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager")
    with VirtualCache(compiled.config, max_length=1 << 16, attention=attention) as past:
        found = compiled.generate(prompt(2), **with_cache(past), max_new_tokens=12, do_sample=False)
        assert past.get_seq_length() == found.shape[1] - 1
    torch._dynamo.reset()
    assert torch.equal(found, wanted)


def test_assisted_by_another_model(model, past):
    helper = make_model("Llama", seed=7, num_hidden_layers=1)
    options = {"max_new_tokens": 30, "do_sample": False}
    wanted = model.generate(prompt(1), **options)
    assert torch.equal(model.generate(prompt(1), assistant_model=helper, **with_cache(past), **options), wanted)


def test_generate_returns_the_cache(model, past):
    out = model.generate(prompt(2), **with_cache(past), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert getattr(out, CACHE) is past
    assert past.get_seq_length() == 15  # the last token was never fed back


def test_attentions_with_the_models_own(model):
    model.config._attn_implementation = "eager"
    try:
        with VirtualCache(model.config, max_length=32, attention=None) as past, torch.no_grad():
            out = model(prompt(2), **with_cache(past), output_attentions=True)
    finally:
        model.config._attn_implementation = "sdpa"
    assert out.attentions[0].shape == (2, 4, 11, 11)


def test_layers_of_different_head_sizes():
    """The shapes are found layer by layer, whatever a config says."""
    config = transformers.LlamaConfig(num_hidden_layers=5, hidden_size=64, num_attention_heads=4)
    shapes = [(4, 16, 16), (2, 16, 16), (4, 16, 24), (1, 8, 8), (2, 16, 16)]
    draw = torch.Generator().manual_seed(0)
    default = DynamicCache(config=config)
    with VirtualCache(config, max_length=64, page_bytes=4096) as past:
        for new in (7, 1, 1, 20):
            for layer, (heads, k_dim, v_dim) in enumerate(shapes):
                k = torch.randn(2, heads, new, k_dim, generator=draw)
                v = torch.randn(2, heads, new, v_dim, generator=draw)
                for got, wanted in zip(past.update(k, v, layer), default.update(k, v, layer), strict=True):
                    assert torch.equal(got, wanted)
        past.kv_cache.check_integrity()
        for layer, other in zip(past.layers, default.layers, strict=True):
            assert torch.equal(layer.keys, other.keys)
            assert torch.equal(layer.values, other.values)


# -- what is left ----------------------------------------------------------------------------------------------------
def _num_mappings():
    with open("/proc/self/maps") as maps:
        return sum(1 for line in maps if "memfd" in line)


@pytest.mark.parametrize("closed", [True, False])
def test_a_hundred_calls_leave_nothing(model, closed):
    """Random batches, prompts and output lengths; closed, or simply dropped."""
    draw = random.Random(0)
    gc.collect()
    before = _num_mappings()
    gc.disable()
    try:
        for _ in range(100):
            past = VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=4096)
            rows, length, new = draw.randint(1, 5), draw.randint(1, 60), draw.randint(1, 4)
            model.generate(prompt(rows, length=length), **with_cache(past), max_new_tokens=new, do_sample=False)
            assert past.get_seq_length() == length + new - 1
            if closed:
                past.close()
        del past
        assert _num_mappings() <= before  # gone with the last reference, not with a collection
    finally:
        gc.enable()


def test_one_cache_for_a_hundred_calls(model, past):
    draw = random.Random(1)
    for _ in range(100):
        past.reset()
        rows, length, new = draw.randint(1, 3), draw.randint(1, 60), draw.randint(1, 4)
        model.generate(prompt(rows, length=length), **with_cache(past), max_new_tokens=new, do_sample=False)
        past.kv_cache.check_integrity()
    past.reset()
    assert past.stats().in_use_bytes == 0
    assert past.stats().physical_bytes <= 3 * 16 * 4096
