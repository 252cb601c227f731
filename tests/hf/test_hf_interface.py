"""Every public name of transformers' caches and layers: a ``VirtualCache`` does the same, or refuses in a sentence.

The names are transformers' own, as installed: one that a later release adds fails here until somebody has looked at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import MAX_LENGTH, checked_cache, close, logits, make_model, prompt  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402

from vattn import ConfigError  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402

NUM_LAYERS, HELD = 4, 11


def rows(seed: int, new: int = 1, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, new, 16, generator=draw), torch.randn(batch, 2, new, 16, generator=draw)


ROWS = torch.tensor([1, 0])
# Name -> what is done with each layer of the default cache and of a VirtualCache, for one outcome.
LAYER: dict[str, Callable[[Any], Any]] = {
    "activate_past_recording": lambda layer: layer.activate_past_recording(),
    "crop": lambda layer: layer.crop(-3),
    "cumulative_length": lambda layer: layer.cumulative_length,
    "device": lambda layer: layer.device,
    "dtype": lambda layer: layer.dtype,
    "get_mask_sizes": lambda layer: layer.get_mask_sizes(2),
    "get_seq_length": lambda layer: layer.get_seq_length(),
    "is_compileable": lambda layer: layer.is_compileable,
    "is_croppable": lambda layer: layer.is_croppable,
    "is_initialized": lambda layer: layer.is_initialized,
    "is_sliding": lambda layer: layer.is_sliding,
    "keys": lambda layer: layer.keys.clone(),
    "offload": lambda layer: layer.offload(),
    "prefetch": lambda layer: layer.prefetch(),
    "record_past": lambda layer: layer.record_past,
    "reset": lambda layer: layer.reset(),
    "sliding_window": lambda layer: layer.sliding_window,
    "supports_early_init": lambda layer: layer.supports_early_init,
    "update": lambda layer: [x.clone() for x in layer.update(*rows(1))],
    "values": lambda layer: layer.values.clone(),
}
# Refused, or the same in another test.
LAYER_ELSE = {
    *("reorder_cache", "batch_repeat_interleave", "batch_select_indices"),
    *("lazy_initialization", "get_max_length", "get_max_cache_shape"),
}
CACHE_DOES: dict[str, Callable[[Any], Any]] = {
    "activate_past_recording": lambda cache: cache.activate_past_recording(),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(1),
    "batch_select_indices": lambda cache: cache.batch_select_indices(ROWS),
    "crop": lambda cache: cache.crop(-3),
    "early_initialization": lambda cache: cache.early_initialization(2, 2, 16, torch.float32, "cpu"),
    "get_conv_state": lambda cache: cache.get_conv_state(0),
    "get_mask_sizes": lambda cache: [cache.get_mask_sizes(3, layer) for layer in range(NUM_LAYERS)],
    "get_query_offset": lambda cache: cache.get_query_offset(1),
    "get_recurrent_state": lambda cache: cache.get_recurrent_state(0),
    "get_seq_length": lambda cache: [cache.get_seq_length(layer) for layer in (0, 1, NUM_LAYERS)],
    "has_previous_state": lambda cache: cache.has_previous_state(),
    "is_compileable": lambda cache: cache.is_compileable,
    "is_croppable": lambda cache: cache.is_croppable,
    "is_dummy": lambda cache: cache.is_dummy,
    "is_initialized": lambda cache: cache.is_initialized,
    "is_linear": lambda cache: cache.is_linear,
    "is_recording_past": lambda cache: [cache.is_recording_past(layer) for layer in range(NUM_LAYERS)],
    "is_sliding": lambda cache: cache.is_sliding,
    "layer_class_to_replicate": lambda cache: cache.layer_class_to_replicate,
    "layers": lambda cache: len(cache.layers),
    "offload": lambda cache: cache.offload(1),
    "offloading": lambda cache: cache.offloading,
    "reorder_cache": lambda cache: cache.reorder_cache(ROWS),
    "reset": lambda cache: cache.reset(),
    "update": lambda cache: [x.clone() for layer in range(NUM_LAYERS) for x in cache.update(*rows(2), layer)],
    "update_conv_state": lambda cache: cache.update_conv_state(torch.zeros(2, 3, 4), 0),
    "update_indexer": lambda cache: cache.update_indexer(torch.zeros(2, 3, 4), 0),
    "update_recurrent_state": lambda cache: cache.update_recurrent_state(torch.zeros(2, 3, 4), 0),
}
# "batch_size" is -1 there where no layer knows it; there is no stream to prefetch on unless layers are offloaded.
CACHE_ELSE = {"batch_size", "get_max_length", "get_max_cache_shape", "max_cache_len", "max_batch_size", "prefetch"}


@pytest.fixture(params=["Llama", "Mistral, window 16"])
def caches(request):
    """A default cache and a VirtualCache that hold the same rows, fewer than a window."""
    model = make_model(request.param)
    with checked_cache(model) as past:
        both = DynamicCache(config=model.config), past
        for cache in both:
            for layer in range(NUM_LAYERS):
                cache.update(*rows(layer, HELD), layer)
        yield both


def public(*kinds: Any) -> set[str]:
    return {name for kind in kinds for name in dir(kind) if not name.startswith("_")}


def test_every_name_is_known(caches):
    default, past = caches
    layers = public(default.layers[0], past.layers[0].__class__.__mro__[1], CacheLayerMixin)
    assert layers <= {*LAYER, *LAYER_ELSE}
    assert public(default, Cache) <= {*CACHE_DOES, *CACHE_ELSE}
    for name in layers:
        assert hasattr(past.layers[0], name), name


def outcome(function: Callable[[Any], Any], of: Any) -> Any:
    try:
        return function(of)
    except (ValueError, TypeError, AttributeError) as error:
        return "missing" if isinstance(error, AttributeError) else "refused"


def same(one: Any, other: Any) -> None:
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, its in zip(one, other, strict=True):
            same(mine, its)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def go_on(default: Cache, past: VirtualCache) -> None:
    """Both hold the same, and do after two more tokens."""
    for seed in (7, 8):
        for layer in range(NUM_LAYERS):
            same(default.update(*rows(seed + layer), layer), past.update(*rows(seed + layer), layer))
        assert default.get_seq_length() == past.get_seq_length()
        for mine, its in zip(past.layers, default.layers, strict=True):
            length = its.keys.shape[2]  # of a window, the default cache forgets what has left it
            same([mine.keys[:, :, -length:], mine.values[:, :, -length:]], [its.keys, its.values])


@pytest.mark.parametrize("name", LAYER)
def test_a_layer_does_the_same(name, caches):
    default, past = caches
    if not hasattr(default.layers[0], name):
        pytest.skip(f"no layer of transformers {transformers.__version__} has it, or not of this kind")
    for mine, its in zip(past.layers, default.layers, strict=True):
        same(outcome(LAYER[name], mine), outcome(LAYER[name], its))
    # Older versions of transformers keep rows, as zeros that count.
    go_on(DynamicCache() if name == "reset" else default, past)


@pytest.mark.parametrize("name", CACHE_DOES)
def test_a_cache_does_the_same(name, caches):
    default, past = caches
    if not hasattr(default, name):
        pytest.skip(f"no cache of transformers {transformers.__version__} has it")
    wanted = outcome(CACHE_DOES[name], default)
    assert wanted != "missing"
    same(outcome(CACHE_DOES[name], past), wanted)
    # Older versions of transformers keep rows, as zeros that count.
    go_on(DynamicCache() if name == "reset" else default, past)


def test_initialized_early():
    config = make_model("Llama").config
    with VirtualCache(config, max_length=MAX_LENGTH, page_bytes=4096) as past:
        default = DynamicCache(config=config)
        for cache in (default, past):
            cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
            assert cache.is_initialized
        go_on(default, past)


def test_iterating(caches):
    default, past = caches
    for mine, its in zip(past, default, strict=True):
        same(list(mine), list(its))
    with VirtualCache(make_model("Llama").config, max_length=MAX_LENGTH) as past:
        assert list(past) == [(None, None, None)] * NUM_LAYERS


@pytest.mark.filterwarnings("ignore")
def test_what_a_virtual_cache_knows_better(caches):
    _, past = caches
    assert past.batch_size == 2
    assert past.get_max_length() == past.layers[0].get_max_length() == MAX_LENGTH
    for name in ("get_max_cache_shape", "max_cache_len", "max_batch_size"):  # of transformers before 5.18
        if hasattr(past, name):
            found = getattr(past, name)
            assert (found() if callable(found) else found) in (MAX_LENGTH, 2)
    past.prefetch(0)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda layer: layer.reorder_cache(ROWS), "the whole cache"),
        (lambda layer: layer.batch_repeat_interleave(2), "the whole cache"),
        (lambda layer: layer.batch_select_indices(ROWS), "the whole cache"),
        (lambda layer: setattr(layer, "keys", torch.zeros(1)), "keys .* cannot be set: write .* in place"),
        (lambda layer: setattr(layer, "values", None), "values .* cannot be set"),
        (lambda layer: setattr(layer, "is_initialized", True), "is_initialized .* cannot be set"),
    ],
)
def test_what_a_layer_refuses(use, message, caches):
    default, past = caches
    with pytest.raises(ConfigError, match=message):
        use(past.layers[1])
    go_on(default, past)


@torch.no_grad()
@pytest.mark.parametrize("use", [lambda layer: layer.reset(), lambda layer: layer.crop(-3)], ids=["reset", "crop"])
def test_one_layer_shorter_than_the_others(use):
    """The next pass is refused, not computed from what the layer no longer holds."""
    model = make_model("Llama")
    with checked_cache(model) as past:
        logits(model, prompt(2), past)
        use(past.layers[2])
        with pytest.raises(ConfigError, match=r"layers \[2\] hold another number of tokens"):
            logits(model, prompt(2)[:, :1], past)
        for layer in past.layers:
            layer.reset()
        close(logits(model, prompt(2), past), logits(model, prompt(2)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_positive_crop_means_what_transformers_says(whole, caches):
    """A length to keep, in older versions; nothing in newer ones."""
    default, past = caches
    for mine, its in [(past, default)] if whole else zip(past.layers, default.layers, strict=True):
        same(outcome(lambda each: each.crop(4), mine), outcome(lambda each: each.crop(4), its))
    go_on(default, past)


def test_layers_of_a_closed_cache(caches):
    _, past = caches
    past.close()
    for use in (lambda layer: layer.reset(), lambda layer: layer.crop(-1), lambda layer: layer.update(*rows(1))):
        with pytest.raises(ConfigError, match="closed"):
            use(past.layers[0])
