"""The row that a step's attention writes: whoever looks before, or instead of, that attention finds it all the same."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
from hf_models import make_model, prompt  # noqa: E402

from vattn.hf import VirtualCache, storage  # noqa: E402


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    monkeypatch.setattr(storage, "supports_uniform_step", lambda *_: True)


def started(name="Llama", device="cpu", length=None):
    """A model, a cache that holds a prompt, and a row to append to a layer."""
    model = make_model(name).to(device)
    past = VirtualCache(model.config, max_length=64)
    model(prompt(2)[:, :length].to(device), past_key_values=past)
    return model, past, [torch.randn(2, 2, 1, 16, device=device) for _ in range(2)]


def append(past, new, layer=0):
    """As a model does whose attention follows."""
    past.layers[layer].reader = append.__code__
    return past.update(*new, layer)


def newest(past, layer=0):
    return [x[:, :, -1:] for x in (past.layers[layer].keys, past.layers[layer].values)]


def is_there(rows, new):
    return all(torch.equal(row, given) for row, given in zip(rows, new, strict=True))


LOOKS = {
    "keys": lambda past, _: newest(past),
    "kv_cache": lambda past, end: [
        x[:2, end - 1 : end].transpose(1, 2) for x in (past.kv_cache.k(0), past.kv_cache.v(0))
    ],
    "deepcopy": lambda past, _: newest(copy.deepcopy(past)),
    "repeated": lambda past, _: (past.batch_repeat_interleave(2), [x[::2] for x in newest(past)])[1],
    "crop": lambda past, end: (past.crop(end), newest(past))[1],
}


@torch.no_grad()
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_before_the_attention_finds_the_row(look, device):
    """Between ``update`` and the attention that would write its row."""
    _, past, new = started(device=device)
    views = append(past, new, 0)
    assert not is_there([x[:, :, -1:] for x in views], new)  # the attention's to write
    assert is_there(LOOKS[look](past, prompt(2).shape[1] + 1), new)
    past.close()


@torch.no_grad()
def test_another_attention_finds_the_row(device):
    model, past, new = started(device=device)
    views = append(past, new, 0)
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["vattn_sdpa"]
    q = torch.randn(2, 4, 1, 16, device=device)
    function(model.model.layers[0].self_attn, q, *views, None, scaling=0.25)
    assert is_there([x[:, :, -1:] for x in views], new)
    append(past, new, 1)
    append(past, new, 2)
    assert is_there(newest(past, 1), new)
    past.close()


@torch.no_grad()
def test_another_layer_s_attention_leaves_the_row(device):
    """A step's attention that comes for a layer whose row is there already."""
    _, past, new = started(device=device)
    append(past, new, 0)
    query = torch.randn(2, 4, 1, 16, device=device)
    assert past.layers[1].attend_step(query, None) is not None
    assert is_there(newest(past), new)
    past.close()


@torch.no_grad()
def test_rows_that_may_not_wait(device):
    """Where the attention is no longer vattn's, updates are wrapped, or a row's elements are apart."""
    model, past, new = started(device=device)
    apart = [torch.randn(2, 2, 16, 2, device=device)[..., :1].transpose(2, 3) for _ in range(2)]
    assert apart[0].stride(3) != 1
    append(past, apart)
    assert past._storage.pending is None
    assert is_there(newest(past), apart)
    past.reset()
    model(prompt(2).to(device), past_key_values=past)
    past.update = lambda *arguments: VirtualCache.update(past, *arguments)
    views = append(past, new, 0)
    assert is_there([x[:, :, -1:] for x in views], new)
    del past.update
    past.reset()
    model(prompt(2).to(device), past_key_values=past)
    views = past.update(*new, 0)  # by hand
    assert is_there([x[:, :, -1:] for x in views], new)
    past.reset()
    model(prompt(2).to(device), past_key_values=past)
    model.config._attn_implementation = "sdpa"
    views = append(past, new, 0)
    assert is_there([x[:, :, -1:] for x in views], new)
    past.close()


def test_a_query_with_gradients_or_elements_apart(device):
    """It goes to other kernels, with the row written."""
    with torch.no_grad():
        _, past, new = started(device=device)
        append(past, new, 0)
        apart = torch.randn(2, 4, 16, 2, device=device)[..., :1].transpose(2, 3)
        assert past.layers[0].attend_step(apart, None) is None
        assert is_there(newest(past), new)
        past.crop(prompt(2).shape[1])
        append(past, new, 0)
    query = torch.randn(2, 4, 1, 16, device=device, requires_grad=True)
    assert past.layers[0].attend_step(query, None) is None
    assert is_there(newest(past), new)
    past.close()


@torch.no_grad()
def test_a_row_of_another_thread(device):
    """What was left there never is written after the cache has gone on without it."""
    model, past, new = started(device=device)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.no_grad()(append), past, new).result()
        assert past._storage.pending is not None
        past.reset()
        assert past._storage.pending is None
        model(prompt(2).to(device), past_key_values=past)
        wanted = [x.clone() for x in newest(past)]
        pool.submit(torch.no_grad()(started), device=device).result()[1].close()
    assert is_there(newest(past), wanted)
    append(past, new, 0)
    past.close()
    assert past._storage.pending is None


@torch.no_grad()
def test_an_interrupt_loses_no_row(device, monkeypatch):
    _, past, new = started(device=device)
    append(past, new, 0)

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(past.layers[0]), "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _ = past.layers[0].keys
    assert is_there(newest(past), new)
    past.close()
