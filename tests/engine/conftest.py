"""The small model, and a cache in which every test has to leave nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.engine import cache_of
from helpers.llama import small_model

from vattn import KVCache
from vattn.models import Llama


@pytest.fixture(scope="module")
def model() -> Llama:
    return small_model()


@pytest.fixture
def cache(model: Llama) -> Iterator[KVCache]:
    with cache_of(model) as cache:
        yield cache
        cache.check_integrity()
        assert cache.stats().num_live_slots == 0
