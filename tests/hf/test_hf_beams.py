"""Rows of a batch that change places: the same K and V as a default cache copies, in shared memory."""

from __future__ import annotations

import copy
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import checked_cache, close, make_model, prompt, with_cache  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from vattn.errors import ConfigError, OutOfPages  # noqa: E402
from vattn.hf import VirtualCache  # noqa: E402
from vattn.hf.beams import moves  # noqa: E402

ROWS_PER_PAGE = 4  # of the cache below: 4 layers, K and V, 2 heads of 16, float32


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


@pytest.fixture
def past(model):
    with checked_cache(model) as past:
        yield past


def new_rows(batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, length, 16, generator=draw) for _ in range(2))  # type: ignore[return-value]


def append(caches: list[transformers.Cache], batch: int, length: int, seed: int) -> None:
    for layer in range(4):
        k, v = new_rows(batch, length, 10 * seed + layer)
        for cache in caches:
            cache.update(k, v, layer)


def same(past: VirtualCache, default: DynamicCache) -> None:
    for mine, other in zip(past.layers, default.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)


@given(st.integers(1, 7).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
def test_moves_one_at_a_time_do_what_all_at_once_would(sources):
    places = [*range(len(sources)), None]
    for target, source in moves(sources):
        assert target != source
        places[target] = places[source]
    assert places[:-1] == sources
    assert len(moves(sources)) <= 1.5 * sum(source != target for target, source in enumerate(sources))


@pytest.mark.parametrize("seed", range(6))
def test_a_walk_of_beams(model, past, seed):
    """Random places, growth by a few tokens, and rows cut off again, where pages are shared."""
    rng, default, batch = random.Random(seed), DynamicCache(config=model.config), 4
    append([past, default], batch, rng.randint(1, 30), seed)
    for step in range(40):
        action = rng.random()
        if action < 0.6:
            order = torch.tensor([rng.randrange(batch) for _ in range(batch)])
            past.reorder_cache(order)
            default.reorder_cache(order)
        elif action < 0.7 and past.get_seq_length() > 9:
            cut = -rng.randint(1, 9)
            past.crop(cut)
            default.crop(cut)
        elif past.get_seq_length() < 140:
            append([past, default], batch, rng.choice([1, 1, 1, 5]), 100 * seed + step + 1)
        same(past, default)
        past.kv_cache.check_integrity()


def test_a_beginning_in_common_is_kept_once(model, past):
    append([past], 4, 100, 0)
    apart = past.stats()
    past.reorder_cache(torch.tensor([2, 2, 2, 2]))
    together = past.stats()
    assert together.shared_bytes == 100 // ROWS_PER_PAGE * 4096
    assert together.in_use_bytes == apart.in_use_bytes // 4
    assert past.kv_cache.seq_len(3) == 100


def test_what_is_in_common_already_takes_no_driver_call(model, past):
    append([past], 4, 100, 0)
    past.reorder_cache(torch.tensor([0, 0, 0, 0]))
    past.reorder_cache(torch.tensor([1, 0, 3, 2]))  # two cycles: the spare slot shares it too from here on
    for step in range(12):
        append([past], 4, 1, step + 1)
        before = past.stats()
        past.reorder_cache(torch.tensor([1, 0, 3, 2]))
        after = past.stats()
        # Only pages of newer tokens differ, one more of each row after every fourth step; moving one takes three calls.
        assert after.num_map - before.num_map <= 6 * (1 + step // ROWS_PER_PAGE), step


def test_no_room_for_a_cycle(model):
    """A page more than there is would be needed for a moment: the rows then move to memory of their own."""
    with VirtualCache(model.config, max_length=160, page_bytes=4096, memory_limit=2 * 3 * 4096) as past:
        default = DynamicCache(config=model.config)
        append([past, default], 2, 10, 0)  # half of the third page
        first = past.kv_cache
        for cache in (past, default):
            cache.reorder_cache(torch.tensor([1, 0]))
        assert past.kv_cache is not first
        same(past, default)
        append([past, default], 2, 2, 1)
        same(past, default)
        with pytest.raises(OutOfPages):
            append([past], 2, 1, 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutOfPages])
@pytest.mark.parametrize("good_calls", range(4))
def test_stopped_half_way(model, past, monkeypatch, error, good_calls):
    """Refused until ``reset``, and sound after it."""
    append([past], 3, 17, 0)
    cache, calls = past.kv_cache, []
    fork = cache.fork

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > good_calls:
            raise error("here")
        return fork(*args, **kwargs)

    monkeypatch.setattr(cache, "fork", failing)
    monkeypatch.setattr(past._storage, "_make", lambda *args: 1 / 0)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ZeroDivisionError):
        past.reorder_cache(torch.tensor([1, 2, 0]))  # a cycle: four forks
    monkeypatch.undo()
    for use in (
        lambda: append([past], 3, 1, 1),
        lambda: past.crop(-1),
        lambda: past.reorder_cache(torch.tensor([0, 1, 2])),
        lambda: past.batch_select_indices(torch.tensor([0])),
        lambda: past.batch_repeat_interleave(2),
        lambda: copy.deepcopy(past),
        lambda: past.layers[0].keys,
    ):
        with pytest.raises(ConfigError, match="half-way"):
            use()
    past.reset()
    assert past.stats().num_live_slots == 3
    default = DynamicCache(config=model.config)
    append([past, default], 3, 9, 2)
    same(past, default)


def test_beams_share_the_prompt(model, past):
    """Token for token, in test_hf_models; here what it takes."""
    options = {"num_beams": 4, "max_new_tokens": 40, "do_sample": False}
    wanted = model.generate(prompt(1, length=60), **options)
    assert torch.equal(model.generate(prompt(1, length=60), **with_cache(past), **options), wanted)
    stats = past.stats()
    assert stats.shared_bytes >= 60 // ROWS_PER_PAGE * 4096
    assert stats.in_use_bytes < 0.6 * 4 * 100 // ROWS_PER_PAGE * 4096
    close(past.layers[0].keys[0, :, :60], past.layers[0].keys[3, :, :60])
