"""The marked words of ``native/decode_step.cu``, in a model of it: no word is lost, and nobody waits for good.

The model has the kernel's phases, its dealing of tiles and who tells and hears what, a tile's rows being one word. What
runs when is drawn at random. A word that was told anew before somebody heard it is an error, as is a state in which all
wait.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

TILE = 16
QKV, PARTS, ATTENDED, ADDED, ACTIVATED, LAYER = range(1, 7)  # Phase in decode_step.cu
Word = tuple[Any, ...]


class WordsError(Exception):
    pass


@dataclass(frozen=True)
class Shape:
    hidden: int
    kv_heads: int
    group: int
    head_dim: int
    intermediate: int
    layers: int

    @property
    def qkv(self) -> int:
        return (self.group + 2) * self.kv_heads * self.head_dim


@dataclass
class Launches:
    """Of one kernel and its scratch memory, one after another.

    Attributes:
        forgets: what a broken kernel would not wait for, ``"parts"`` or ``"attended"``.
    """

    shape: Shape
    multiprocessors: int
    draw: random.Random
    forgets: str = ""
    mark: int = 0

    def __post_init__(self) -> None:
        self.words: dict[Word, int] = {}

    def tell(self, word: Word, mark: int) -> None:
        if self.words.get(word, 0) >= mark:
            raise WordsError(f"{word} is told as {mark} after {self.words[word]}")
        self.words[word] = mark

    def hear(self, words: list[Word], mark: int) -> Iterator[tuple[Word, int] | None]:
        self.draw.shuffle(words)
        for word in words:
            while (found := self.words.get(word, 0)) != mark:
                if found > mark:
                    raise WordsError(f"{word} is {found}, and somebody still waits for {mark}")
                yield word, mark

    def multiprocessor(self, block: int, batch: int, splits: int) -> Iterator[tuple[Word, int] | None]:
        """Gives what it waits for next, None where it goes on."""
        shape, grid, offset, mark = self.shape, self.multiprocessors, 0, self.mark

        def dealt(tiles: int) -> range:
            nonlocal offset
            first = (block + grid - offset) % grid
            offset = (offset + tiles) % grid
            return range(first, tiles, grid)

        hidden, pairs, queries = (
            -(-shape.hidden // TILE),
            -(-shape.intermediate // (TILE // 2)),
            shape.group * shape.kv_heads,
        )
        outputs = shape.group * shape.head_dim // 32  # words of a KV head's result

        def of_tokens(kind: str, count: int) -> list[Word]:
            return [(kind, token, word) for token in range(batch) for word in range(count)]

        for layer in range(shape.layers):
            if tiles := dealt(-(-shape.qkv // TILE)):
                if layer:
                    yield from self.hear(of_tokens("stream", hidden), mark)
                for tile in tiles:
                    yield None
                    for token in range(batch):
                        self.tell(("qkv", token, tile), mark + QKV)
            for unit in range(block, batch * shape.kv_heads * splits, grid):
                split, head, token = unit % splits, unit // splits % shape.kv_heads, unit // splits // shape.kv_heads
                heads = [head * shape.group + i for i in range(shape.group)]
                if split == splits - 1:
                    heads += [queries + head, queries + shape.kv_heads + head]
                tiles_of_head = shape.head_dim // TILE
                wanted = [("qkv", token, each * tiles_of_head + i) for each in heads for i in range(tiles_of_head)]
                yield from self.hear(wanted, mark + QKV)
                for output in range(outputs) if splits > 1 else ():
                    self.tell(("parts", unit, output), mark + PARTS)
                    yield None
                for output in range(split, outputs, splits):
                    if splits > 1 and self.forgets != "parts":
                        yield from self.hear([("parts", unit - split + i, output) for i in range(splits)], mark + PARTS)
                    self.tell(("attended", token, head * outputs + output), mark + ATTENDED)
            if tiles := dealt(hidden):
                words = of_tokens("attended", shape.kv_heads * outputs)
                yield from self.hear(words[len(words) // 2 :] if self.forgets == "attended" else words, mark + ATTENDED)
                yield from self.add(tiles, batch, mark if layer else None, mark + ADDED)
            if tiles := dealt(pairs):
                yield from self.hear(of_tokens("stream", hidden), mark + ADDED)
                for tile in tiles:
                    yield None
                    for token in range(batch):
                        self.tell(("activated", token, tile), mark + ACTIVATED)
            if tiles := dealt(hidden):
                yield from self.hear(of_tokens("activated", pairs), mark + ACTIVATED)
                yield from self.add(tiles, batch, mark + ADDED, mark + LAYER)
            mark += LAYER
        if dealt(7):  # of the output projection
            yield from self.hear(of_tokens("stream", hidden), mark)

    def add(self, tiles: range, batch: int, heard: int | None, told: int) -> Iterator[tuple[Word, int] | None]:
        for tile in tiles:
            for token in range(batch):
                if heard is not None:
                    yield from self.hear([("stream", token, tile)], heard)
                yield None
                self.tell(("stream", token, tile), told)

    def launch(self, batch: int) -> None:
        splits = max(1, min(self.multiprocessors // (batch * self.shape.kv_heads), 32))
        splits = self.draw.choice((splits, splits, 1, min(2, splits)))
        running = {block: self.multiprocessor(block, batch, splits) for block in range(self.multiprocessors)}
        waits: dict[int, tuple[Word, int] | None] = dict.fromkeys(running)
        slow = set(self.draw.sample(list(running), self.draw.randrange(len(running))))  # these go on last
        while running:
            ready = [at for at in running if (word := waits[at]) is None or self.words.get(word[0], 0) >= word[1]]
            if not ready:
                raise WordsError(f"all wait: {waits}")
            fast = [block for block in ready if block not in slow]
            block = self.draw.choice(fast if fast and self.draw.random() < 0.99 else ready)
            for _ in range(self.draw.choice((1, 3, 50))):
                try:
                    waits[block] = next(running[block])
                except StopIteration:
                    del running[block]
                    break
                if waits[block] is not None:
                    break
        self.mark += LAYER * self.shape.layers


def random_launches(seed: int, shapes: int = 40, forgets: str = "") -> None:
    draw = random.Random(seed)
    for _ in range(shapes):
        shape = Shape(
            hidden=32 * draw.randint(1, 16),
            kv_heads=draw.choice((1, 2, 3, 4)),
            group=draw.choice((1, 2, 4, 7)),
            head_dim=draw.choice((64, 128)),
            intermediate=32 * draw.randint(1, 16),
            layers=draw.choice((1, 2, 3)),
        )
        launches = Launches(shape, draw.choice((1, 2, 5, 17, 40)), draw, forgets)
        for _ in range(draw.randint(1, 3)):
            launches.launch(draw.choice((1, 1, 2, 5)))


@pytest.mark.parametrize("seed", range(4))
def test_no_word_is_lost_and_nobody_waits_for_good(seed):
    random_launches(seed)


@pytest.mark.parametrize("forgets", ["parts", "attended"])
def test_the_model_finds_a_kernel_that_does_not_wait(forgets):
    with pytest.raises(WordsError, match="still waits"):
        random_launches(1, shapes=1000, forgets=forgets)
