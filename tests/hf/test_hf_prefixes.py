"""``VirtualCache(prefix_caching=True)``: rows of stored sequences are found by their tokens, and are the right ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import CACHE, MAX_LENGTH, close, logits, make_model, prompt  # noqa: E402

from vattn import ConfigError  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402

PAGE = 4096
NEW = 8


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


def open_past(model, **options) -> VirtualCache:
    return VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=PAGE, prefix_caching=True, **options)


@pytest.fixture
def past(model) -> Iterator[VirtualCache]:
    with open_past(model) as past:
        yield past
        if past.kv_cache is not None:
            past.kv_cache.check_integrity()


def generate(model, tokens: torch.Tensor, past: VirtualCache | None = None) -> torch.Tensor:
    options = {} if past is None else {CACHE: past}
    return model.generate(tokens, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)


def computed(model, tokens: torch.Tensor, past: VirtualCache) -> tuple[torch.Tensor, int]:
    """(what ``generate`` returns, tokens that its first pass computed)."""
    lengths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, given, output: lengths.append(output.shape[1]))
    try:
        return generate(model, tokens, past), lengths[0]
    finally:
        hook.remove()


def changed(tokens: torch.Tensor, at: int) -> torch.Tensor:
    other = tokens.clone()
    other[:, at:] = (other[:, at:] + 1) % 90
    return other


def test_a_prompt_begins_with_what_an_earlier_one_has_of_it(model, past):
    first = prompt(1, length=60)
    assert past.begin(first) == 0
    past.store(generate(model, first, past))
    assert past.kv_cache.stats().num_stored_slots == 1
    for at in (60, 41, 23, 1):
        text = torch.cat([first[:, :at], changed(first, 0)[:, :9]], dim=1)
        assert past.begin(text) == at == past.get_seq_length()
        output, num_computed = computed(model, text, past)
        assert num_computed == text.shape[1] - at
        assert torch.equal(output, generate(model, text))
    assert past.begin(changed(first, 0)) == 0
    assert past.begin(first[:, :30]) == 29, "a pass needs a token to compute"
    assert past.begin(first[:, :0]) == 0


def test_a_conversation_goes_on_and_another_comes_between(model, past):
    texts = [prompt(1, seed=seed, length=30) for seed in (1, 2)]
    for turn in range(3):
        for index in (0, 1):
            begun = past.begin(texts[index])
            assert begun == (texts[index].shape[1] - 6 if turn else 0)  # the last answer's last token, and five new
            output = generate(model, texts[index], past)
            assert torch.equal(output, generate(model, texts[index]))
            past.store(output)
            texts[index] = torch.cat([output, prompt(1, seed=10 + turn, length=5)], dim=1)
    assert past.kv_cache.stats().num_stored_slots == 2, "a sequence takes the place of its own beginning"


def test_what_is_stored_stays_what_it_is(model, past):
    """The batch goes on, is cut and written again, in pages that it shares with what is stored."""
    text = prompt(1, length=50)
    logits(model, text, past)
    past.store(text)
    past.crop(-20)
    logits(model, changed(text, 0)[:, :25], past)
    more = torch.cat([text, prompt(1, seed=5, length=4)], dim=1)
    assert past.begin(more) == 50
    close(logits(model, more[:, 50:], past), logits(model, more)[:, 50:])


def test_a_batch_begins_with_what_all_of_it_has(model, past):
    texts = prompt(3, length=40)
    past.store(generate(model, texts, past))
    mixed = texts[[2, 0, 0]].clone()
    mixed[1] = changed(texts[:1], 17)[0]
    assert past.begin(mixed) == 17
    assert torch.equal(generate(model, mixed, past), generate(model, mixed))
    assert past.begin(texts[:2]) == 0, "of another batch size"
    assert torch.equal(generate(model, texts[:2], past), generate(model, texts[:2]))


@pytest.mark.parametrize("size", [33, 40])
def test_a_large_batch_does_not_push_out_its_own_rows(model, past, size):
    texts = prompt(size, length=20)
    for turn in range(3):
        begun = past.begin(texts)
        assert begun == (texts.shape[1] - 2 if turn else 0)  # all but the turn's new tokens
        close(logits(model, texts[:, begun:], past), logits(model, texts)[:, begun:])
        past.store(texts)
        assert past.batch_size == size
        assert past.kv_cache.stats().num_stored_slots == size
        texts = torch.cat([texts, prompt(size, seed=20 + turn, length=2)], dim=1)
    past.reset()
    assert past.begin(texts[:, :-2]) == texts.shape[1] - 3


def test_storing_shares_memory(model, past):
    text = prompt(1, length=100)
    logits(model, text, past)
    before = past.stats().in_use_bytes
    past.store(text)
    assert past.stats().physical_bytes - before <= PAGE, "more than the page that the rows end in"
    past.store(text)
    assert past.kv_cache.stats().num_stored_slots == 1, "the same rows twice"


def test_the_sequence_used_least_recently_goes_first(model, monkeypatch):
    monkeypatch.setattr("vattn.hf.cache.NUM_STORED", 2)
    texts = [prompt(1, seed=seed, length=30) for seed in range(3)]
    with open_past(model) as past:
        for index in (0, 1, 0, 2):
            begun = past.begin(texts[index])
            logits(model, texts[index][:, begun:], past)
            past.store(texts[index])
        assert [past.begin(text) for text in texts] == [29, 0, 29]
        past.kv_cache.check_integrity()


def test_stored_rows_make_room(model):
    """Memory for one long sequence and little more: what is stored goes, from its end, and no call fails."""
    text, other = prompt(1, length=100), prompt(1, seed=7, length=100)
    with open_past(model) as past:
        logits(model, text, past)
        limit = past.stats().physical_bytes + 2 * PAGE
    with open_past(model, memory_limit=limit) as past:
        for tokens in (text, other, text):
            begun = past.begin(tokens)
            assert begun < 50
            close(logits(model, tokens[:, begun:], past), logits(model, tokens)[:, begun:])
            past.store(tokens)
            past.kv_cache.check_integrity()
        assert past.begin(text) > 0
        past.kv_cache.check_integrity()


def test_a_cache_that_moved_has_nothing_stored(model, past):
    text = prompt(1, length=30)
    logits(model, text, past)
    past.store(text)
    twin = copy.deepcopy(past)
    assert twin.begin(text) == 0
    twin.close()
    past.batch_repeat_interleave(2)
    assert past.begin(text.repeat(2, 1)) == 0
    logits(model, text.repeat(2, 1), past)
    past.store(text.repeat(2, 1))
    assert past.begin(text.repeat(2, 1)) == 29


def test_refusals(model, past):
    text = prompt(2, length=20)
    with VirtualCache(model.config, max_length=MAX_LENGTH) as plain, pytest.raises(ConfigError, match="prefix_caching"):
        plain.begin(text)
    with pytest.raises(ConfigError, match="token ids"):
        past.begin(text[0])
    with pytest.raises(ConfigError, match="token ids"):
        past.store(text.float())
    logits(model, text, past)
    with pytest.raises(ConfigError, match="2 sequences with 20 rows"):
        past.store(text[:, :19])
    with pytest.raises(ConfigError, match="2 sequences with 20 rows"):
        past.store(text[:1])
    assert past.get_seq_length() == 20, "nothing was forgotten"
    past.close()
    with pytest.raises(ConfigError, match="closed"):
        past.begin(text)
    hybrid = transformers.RecurrentGemmaConfig(num_hidden_layers=3)
    with pytest.raises(ConfigError, match="recurrent"):
        VirtualCache(hybrid, max_length=64, prefix_caching=True)
    with pytest.raises(ConfigError, match="images"):
        VirtualCache(transformers.Gemma3Config(), max_length=64, prefix_caching=True)


# -- what is not stored ----------------------------------------------------------------------------------------------
def test_half_a_pass_is_not_stored(model, past):
    """Its rows would be found, and most layers have none."""

    def fail(*args):
        raise RuntimeError("interrupted")

    tokens = prompt(1, length=40)
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with torch.no_grad(), pytest.raises(RuntimeError, match="interrupted"):
            model(tokens, **{CACHE: past})
    finally:
        hook.remove()
    with pytest.raises(ConfigError, match="a pass ended half-way"):
        past.store(tokens)
    assert past.begin(tokens) == 0


def test_beams_are_not_stored(model, past):
    """The rows are those of the running beams, not of the sequences that are returned."""
    tokens = prompt(1, length=40)
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, **options, **{CACHE: past})
    with pytest.raises(ConfigError, match="changed places, as in beam search"):
        past.store(found)
    past.begin(tokens)
    past.store(generate(model, tokens, past))  # after it the cache can be used as before
    assert past.begin(tokens) == 39


def test_padding_is_not_stored(model, past):
    tokens = prompt(2, length=40)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **{CACHE: past}
    )
    with pytest.raises(ConfigError, match="a mask has hidden tokens"):
        past.store(out)
    assert past.begin(tokens) == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused(kind):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]}
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)
    config.rope_parameters = parameters
    with pytest.raises(ConfigError, match="longrope RoPE"):
        VirtualCache(config, prefix_caching=True)
    VirtualCache(config).close()


@pytest.mark.parametrize("value", ["False", 1, None])
def test_prefix_caching_is_a_switch(model, value):
    with pytest.raises(ConfigError, match="prefix_caching must be True or False"):
        VirtualCache(model.config, prefix_caching=value)


def test_an_interrupted_begin_leaves_an_empty_batch(model, past, monkeypatch):
    tokens = prompt(2, length=40)
    past.store(generate(model, tokens, past))

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(past.kv_cache, "fork", interrupted)
        with pytest.raises(KeyboardInterrupt):
            past.begin(tokens)
    assert past.get_seq_length() == 0
    assert torch.equal(generate(model, tokens, past), generate(model, tokens))
