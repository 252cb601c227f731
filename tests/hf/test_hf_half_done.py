"""What a ``VirtualCache`` is after an operation that was interrupted or failed: whole, or refused until ``reset()``."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import MAX_LENGTH, checked_cache, close, logits, make_model, prompt  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from vattn import ConfigError, KVCache, OutOfPages  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


@pytest.fixture
def past(model):
    with checked_cache(model) as past:
        yield past


class Interrupted(Exception):
    pass


def interrupt(module):
    """Let the module's next call fail."""

    def hook(*args):
        handle.remove()
        raise Interrupted

    handle = module.register_forward_pre_hook(hook)


def test_an_interrupted_crop_leaves_no_row_without_memory(model, past, monkeypatch):
    """Some sequences are cut, others not yet: the next pass finds memory under the rows of all of them."""
    default = DynamicCache(config=model.config)
    for cache in (past, default):
        logits(model, prompt(3), cache)
    truncate = KVCache.truncate

    def interrupted(cache, slot, rows):
        truncate(cache, slot, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "truncate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            past.crop(-6)
    default.crop(-6)
    more = prompt(3, seed=1, length=6)  # to where the sequences were before
    close(logits(model, more, past), logits(model, more, default))


@pytest.mark.parametrize("tokens_before", [0, 11])
def test_an_interrupted_pass(model, past, tokens_before):
    """The next pass is refused before it computes a token; after reset() all is well."""
    if tokens_before:
        logits(model, prompt(2), past)
    interrupt(model.model.layers[1])
    with pytest.raises(Interrupted):
        logits(model, prompt(2), past)
    with pytest.raises(ConfigError, match=r"layers \[1, 2, 3\] hold another number of tokens.*interrupted"):
        logits(model, prompt(2), past)
    past.reset()
    close(logits(model, prompt(2), past), logits(model, prompt(2)))


def test_hybrids_fail_whole():
    model = make_model("Qwen3-Next")
    with VirtualCache(model.config, max_length=64, page_bytes=4096) as past:
        with pytest.raises(ConfigError, match="needs 70 tokens"):
            logits(model, prompt(1, length=70), past)
        with pytest.raises(ConfigError, match=r"layers are apart: call reset\(\)"):
            logits(model, prompt(1), past)
        past.reset()
        close(logits(model, prompt(2), past), logits(model, prompt(2)))
        for refused in (
            lambda: past.crop(-3),
            lambda: past.batch_select_indices(torch.tensor([0])),
            lambda: past.batch_repeat_interleave(2),
            lambda: copy.deepcopy(past),
        ):
            with pytest.raises((ConfigError, RuntimeError)):
                refused()
        both = torch.cat([prompt(2), prompt(2, seed=3, length=2)], dim=1)
        close(logits(model, prompt(2, seed=3, length=2), past), logits(model, both)[:, 11:])
        past.reset()
        close(logits(model, prompt(3), past), logits(model, prompt(3)))


def test_regrouping_fails_whole(model):
    with VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=4096, memory_limit=40 * 4096) as past:
        logits(model, prompt(3), past)
        with pytest.raises(OutOfPages):
            past.batch_repeat_interleave(30)
        for wrong, message in (
            (torch.tensor([3]), "sequences of a batch of 3"),
            (torch.tensor([-4]), "sequences of a batch of 3"),
            (torch.tensor([], dtype=torch.long), "sequences of a batch of 3"),
            (torch.tensor([True, False]), "must have 3 elements"),
        ):
            with pytest.raises(ConfigError, match=message):
                past.batch_select_indices(wrong)
        for wrong in (torch.tensor([1]), torch.tensor([1, 0])):
            with pytest.raises(ConfigError, match="a row for each of the 3 sequences"):
                past.reorder_cache(wrong)
        past.batch_select_indices([-1, 0])
        wanted = logits(model, torch.cat([prompt(3)[[2, 0]], prompt(2, seed=2)], dim=1))[:, 11:]
        close(logits(model, prompt(2, seed=2), past), wanted)


def test_reordering_half_of_the_layers(model, past, monkeypatch):
    logits(model, prompt(2), past)
    with pytest.raises(ConfigError, match="beam_idx"):
        past.reorder_cache(torch.tensor([0]))
    logits(model, prompt(2), past)
    with pytest.raises(ConfigError, match="the whole cache"):
        past.layers[1].reorder_cache(torch.tensor([1, 0]))
    for wrong in ([0, 2], [-1, 0]):
        with pytest.raises(ConfigError, match="rows of a batch of 2"):
            past.reorder_cache(torch.tensor(wrong))
    logits(model, prompt(2), past)
    monkeypatch.setattr(past.kv_cache, "fork", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        past.reorder_cache(torch.tensor([1, 0]))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="half-way"):
        logits(model, prompt(2), past)
    past.reset()
    close(logits(model, prompt(2), past), logits(model, prompt(2)))
