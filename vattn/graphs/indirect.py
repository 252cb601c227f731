"""Indirection: a replay reads the caller's tensors where they are, instead of copies in the graph's placeholders.

The idea is PyGraph's (arXiv 2503.19779). There kernels are compiled anew to follow a pointer to the pointer. Here the
nodes of the graph get the new addresses, so that kernels stay as they are, those of libraries too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

from .nodes import Node
from .pointers import Span, compare

__all__ = ["Indirection", "readers"]

# Kernels are chosen by how addresses are aligned. This is what CUDA aligns its allocations to (CUDA C++ Programming
# Guide, "Device Memory Accesses"), so no kernel can count on more.
ALIGNMENT = 256


class Word:
    """A word of a node that holds an address within an input."""

    def __init__(self, node: Node, offset: int, distance: int) -> None:
        self.node, self.distance = node, distance
        self.value = ctypes.c_uint64.from_buffer(node.values, offset)


def readers(
    earlier: Sequence[Node], later: Sequence[Node], before: Sequence[Span], after: Sequence[Span]
) -> tuple[dict[int, list[Word]], dict[int, str]]:
    """The words of the later capture's nodes that point to each input, by its number, and why others are left out.

    An input that no node reads has no words.

    Args:
        earlier, later: the nodes of two captures of one forward.
        before, after: where each input was in each of them.
    """
    words: dict[int, list[Word]] = {number: [] for number in range(len(after))}
    if [node.kind for node in earlier] != [node.kind for node in later]:
        return {}, dict.fromkeys(words, "two captures of the forward launched different work")
    refused: dict[int, str] = {}
    for node, first in zip(later, earlier, strict=True):
        for pointer in compare(first.values.raw, node.values.raw, before, after):
            if pointer.distance is None or pointer.offset + 8 > node.movable:
                refused[pointer.number] = f"a node ({_kind(node)}) holds its address in a form that cannot be changed"
            else:
                words[pointer.number].append(Word(node, pointer.offset, pointer.distance))
    return {number: found for number, found in words.items() if number not in refused}, refused


def _kind(node: Node) -> str:
    return str(node.kind[0] if isinstance(node.kind, tuple) else node.kind)


class Indirection:
    """Where an executable graph reads each of its inputs.

    Args:
        executable: of the graph that has the nodes.
        words: those that point to each input that can be moved.
        homes: the first address of each input's placeholder, where the nodes point now.
    """

    def __init__(self, executable: Any, words: dict[int, list[Word]], homes: Sequence[int]) -> None:
        self._executable, self._words = executable, words
        self._at = list(homes)
        self._nodes = {number: list(dict.fromkeys(word.node for word in found)) for number, found in words.items()}

    def num_nodes(self, numbers: Iterable[int]) -> int:
        """How many nodes read any of these inputs."""
        return len({node for number in numbers for node in self._nodes.get(number, ())})

    def point(self, addresses: Sequence[int]) -> int:
        """Make later launches read each input at the address given; returns the number of nodes updated.

        Launches that are under way read where they did.

        Raises:
            DriverError: CUDA refuses. Then nobody knows where the graph reads: instantiate it anew.
        """
        if self._at == addresses:
            return 0
        nodes: dict[Node, None] = {}
        for number, (now, address) in enumerate(zip(self._at, addresses, strict=True)):
            if now != address:
                self._at[number] = 0  # until it is done, as an interrupt may come between
                for word in self._words[number]:
                    word.value.value = address + word.distance
                nodes |= dict.fromkeys(self._nodes[number])
        for node in nodes:
            node.set(self._executable)
        self._at[:] = addresses
        return len(nodes)
