"""Which slots have the rows of which tokens: a radix tree for each salt. Plain data, no tensors.

An edge has the tokens of a stretch that no two sequences part in, so a look-up takes one comparison of arrays for each
place where others part from the prompt, and none for a token.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

import numpy as np

__all__ = ["PrefixIndex"]


class _Node:
    """Attributes:
    tokens: of the edge that leads here.
    children: by the first token of the edge that leads to each.
    slots: of the sequences that come by here, or end here.
    """

    __slots__ = ("children", "slots", "tokens")

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        self.children: dict[int, _Node] = {}
        self.slots: set[int] = set()


class PrefixIndex:
    """The tokens of sequences, one to a slot; those of different salts have nothing in common.

    Tokens are int32 arrays, which their callers do not change.
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, _Node] = {}
        self._sequences: dict[int, tuple[Hashable, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def length(self, slot: int) -> int:
        """Tokens of the slot's sequence; 0 where none is."""
        return len(self._sequences[slot][1]) if slot in self._sequences else 0

    def put(self, slot: int, salt: Hashable, tokens: np.ndarray) -> None:
        """The slot has the rows of these tokens, instead of those that it had before."""
        self.remove(slot)
        if not len(tokens):
            return
        self._sequences[slot] = salt, tokens
        node = self._roots.setdefault(salt, _Node(tokens[:0]))
        node.slots.add(slot)
        start = 0
        while start < len(tokens):
            first = int(tokens[start])
            child = node.children.get(first)
            if child is None:
                child = node.children[first] = _Node(tokens[start:])
            elif (common := _common(child.tokens, tokens[start:])) < len(child.tokens):
                child = node.children[first] = _split(child, common)
            child.slots.add(slot)
            start += len(child.tokens)
            node = child

    def shorten(self, slot: int, length: int) -> None:
        """The slot has only so many of its rows left."""
        if length < self.length(slot):
            salt, tokens = self._sequences[slot]
            self.put(slot, salt, tokens[:length])

    def remove(self, slot: int) -> None:
        """The slot has none of its rows any more."""
        if slot not in self._sequences:
            return
        salt, tokens = self._sequences.pop(slot)
        node, start = self._roots[salt], 0
        node.slots.discard(slot)
        if not node.slots:
            del self._roots[salt]
            return
        while start < len(tokens):
            first = int(tokens[start])
            child = node.children[first]
            child.slots.discard(slot)
            if not child.slots:
                del node.children[first]
                break
            start += len(child.tokens)
            parent, node = node, child
        if start and len(node.children) == 1:  # no two part here any more, or none ends here
            (child,) = node.children.values()
            if len(child.slots) == len(node.slots):
                child.tokens = np.concatenate((node.tokens, child.tokens))
                parent.children[int(child.tokens[0])] = child

    def find(self, salt: Hashable, tokens: np.ndarray) -> list[tuple[int, Collection[int]]]:
        """(how many of these tokens, slots that begin with so many of them), the most first. Slots come again with
        fewer."""
        found: list[tuple[int, Collection[int]]] = []
        node, start = self._roots.get(salt), 0
        while node is not None and start < len(tokens):
            node = node.children.get(int(tokens[start]))
            if node is not None:
                common = _common(node.tokens, tokens[start:])
                start += common
                found.append((start, node.slots))
                if common < len(node.tokens):
                    break
        return found[::-1]

    def check_integrity(self) -> None:
        """AssertionError where the trees are not what the sequences make them; for tests."""
        seen: dict[int, int] = {}
        for salt, root in self._roots.items():
            assert root.slots, "an empty tree is kept"
            assert all(self._sequences[slot][0] == salt for slot in root.slots), "a sequence is in another's tree"
            nodes = [(root, 0)]
            while nodes:
                node, start = nodes.pop()
                end = start + len(node.tokens)
                for slot in node.slots:
                    assert np.array_equal(self._sequences[slot][1][start:end], node.tokens), "an edge has other tokens"
                    seen[slot] = max(seen.get(slot, 0), end)
                below = [slot for child in node.children.values() for slot in child.slots]
                assert len(set(below)) == len(below), "a sequence goes two ways"
                assert set(below) <= node.slots, "a sequence comes from nowhere"
                assert node is root or len(node.children) != 1 or len(below) < len(node.slots), (
                    "an edge is in two parts"
                )
                assert all(int(child.tokens[0]) == first for first, child in node.children.items())
                nodes += [(child, end) for child in node.children.values()]
        assert seen == {slot: len(tokens) for slot, (_, tokens) in self._sequences.items()}, "an end is missing"


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _split(node: _Node, at: int) -> _Node:
    """Put a node in the middle of the edge that leads to this one."""
    middle = _Node(node.tokens[:at])
    middle.slots = set(node.slots)
    node.tokens = node.tokens[at:]
    middle.children[int(node.tokens[0])] = node
    return middle
