"""The index by itself: what it finds is what a look at every sequence finds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from vattn.engine import prefix_index
from vattn.engine.prefix_index import PrefixIndex


def of(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def found(index: PrefixIndex, salt: str | None, tokens: Sequence[int]) -> list[tuple[int, list[int]]]:
    return [(length, sorted(slots)) for length, slots in index.find(salt, of(*tokens))]


def test_the_longest_prefix_comes_first() -> None:
    index = PrefixIndex()
    index.put(0, None, of(1, 2, 3, 4))
    index.put(1, None, of(1, 2, 5))
    index.put(2, None, of(1, 2))
    assert found(index, None, (1, 2, 3, 4, 9)) == [(4, [0]), (2, [0, 1, 2])]
    assert found(index, None, (1, 2, 3)) == [(3, [0]), (2, [0, 1, 2])]
    assert found(index, None, (1, 9)) == [(1, [0, 1, 2])]
    assert found(index, None, (9,)) == found(index, None, ()) == []
    index.check_integrity()


def test_salts_have_nothing_in_common() -> None:
    index = PrefixIndex()
    index.put(0, "a", of(1, 2, 3))
    index.put(1, None, of(1, 2))
    assert found(index, "b", (1, 2, 3)) == []
    assert found(index, "a", (1, 2, 3)) == [(3, [0])]
    assert found(index, None, (1, 2, 3)) == [(2, [1])]
    index.remove(0)
    assert found(index, "a", (1, 2, 3)) == []
    index.check_integrity()


def test_a_slot_has_one_sequence() -> None:
    index = PrefixIndex()
    index.put(0, None, of(1, 2, 3))
    index.put(0, "a", of(4, 5))
    assert (found(index, None, (1, 2)), found(index, "a", (4, 5)), index.length(0)) == ([], [(2, [0])], 2)
    index.shorten(0, 1)
    assert (found(index, "a", (4, 5)), index.length(0)) == ([(1, [0])], 1)
    index.shorten(0, 0)
    index.shorten(7, 0)
    index.remove(7)
    assert (len(index), index.length(0)) == (0, 0)
    index.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_a_random_life(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex()
    sequences: dict[int, tuple[str | None, list[int]]] = {}
    for _ in range(1500):
        slot, salt = rng.randrange(12), rng.choice((None, "a"))
        action = rng.random()
        if action < 0.5:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(12))]
            if sequences and rng.random() < 0.5:  # one that goes on
                salt, other = rng.choice(list(sequences.values()))
                tokens = other[: rng.randrange(len(other) + 1)] + tokens
            index.put(slot, salt, of(*tokens))
            sequences.pop(slot, None)
            if tokens:
                sequences[slot] = salt, tokens
        elif action < 0.7:
            length = rng.randrange(12)
            index.shorten(slot, length)
            if slot in sequences:
                salt, tokens = sequences.pop(slot)
                if tokens[:length]:
                    sequences[slot] = salt, tokens[:length]
        else:
            index.remove(slot)
            sequences.pop(slot, None)
        index.check_integrity()
        assert len(index) == len(sequences)
        wanted = [rng.randrange(2) for _ in range(rng.randrange(16))]
        common = {slot: shared(tokens, wanted) for slot, (of_salt, tokens) in sequences.items() if of_salt == salt}
        longest: dict[int, int] = {}
        for length, slots in index.find(salt, of(*wanted)):
            for each in slots:
                longest.setdefault(each, length)
        assert longest == {slot: length for slot, length in common.items() if length}


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_nothing_is_done_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """One comparison of arrays for each place where others part from the prompt, whatever has come and gone."""
    num_calls = 0
    common = prefix_index._common

    def counted(one: np.ndarray, other: np.ndarray) -> int:
        nonlocal num_calls
        num_calls += 1
        return common(one, other)

    monkeypatch.setattr(prefix_index, "_common", counted)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, 16384, np.int32)
    index = PrefixIndex()
    for i in range(500):
        tokens = prompt.copy()
        tokens[rng.integers(16384) :] += 1000
        index.put(i % 20, None, tokens)
    num_calls = 0
    assert index.find(None, prompt)[0][0] < 16384
    assert num_calls <= 21
    index.check_integrity()
