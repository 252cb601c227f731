"""The words of a graph's nodes that are addresses within inputs, told by two captures."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest

from vattn import DriverError
from vattn.graphs.indirect import Indirection, readers
from vattn.graphs.nodes import Node, Unknown, _whole, call
from vattn.graphs.pointers import Pointer, Span, compare

BEFORE = [Span(0x7F00_0000_0000, 4096), Span(0x7F00_0001_0000, 64)]
AFTER = [Span(0x7F10_0000_2000, 4096), Span(0x7F10_0003_0000, 64)]


def both(layout, words):
    """What a node holds in each capture. A word is a number, or (number of an input, distance) for an address."""
    captures = []
    for spans in (BEFORE, AFTER):
        values = [spans[word[0]].start + word[1] if isinstance(word, tuple) else word for word in words]
        captures.append(struct.pack(layout, *values))
    return captures


@pytest.mark.parametrize(
    ("layout", "words", "found"),
    [
        ("<Q", [(0, 0)], [Pointer(0, 0, 0)]),
        ("<QQQ", [7, (1, 0), (0, 4095)], [Pointer(8, 1, 0), Pointer(16, 0, 4095)]),
        ("<IQ", [3, (0, 16)], [Pointer(4, 0, 16)]),  # packed
        ("<IQIQ", [3, (0, 16), 4, (1, 8)], [Pointer(4, 0, 16), Pointer(16, 1, 8)]),
        ("<QQ", [(0, 8), (0, 8)], [Pointer(0, 0, 8), Pointer(8, 0, 8)]),
        ("<Q", [(0, 4096)], []),  # one past its end
        ("<Q", [(0, -1)], []),
        ("<Q", [AFTER[0].start + 8], []),  # a number that looks like an address
        ("<Q", [0], []),
        ("<B", [1], []),
        ("<QH", [(0, 0), 3], [Pointer(0, 0, 0)]),
    ],
)
def test_a_word_that_moved_as_the_input_did_is_a_pointer(layout, words, found):
    assert compare(*both(layout, words), BEFORE, AFTER) == found


def test_a_word_that_came_to_lie_in_an_input_in_another_way_is_not_known():
    (moved,) = both("<Q", [(0, 8)])[1:]
    for earlier in (0, BEFORE[0].start + 16, BEFORE[1].start):
        assert compare(struct.pack("<Q", earlier), moved, BEFORE, AFTER) == [Pointer(0, 0, None)]


def test_among_random_words_the_pointers_are_found():
    random = np.random.default_rng(0)
    for _ in range(200):
        words = [int(word) for word in random.integers(0, 2**63, 40)]
        places = random.choice(40, 5, replace=False)
        expected = []
        for place in sorted(map(int, places)):
            number = int(random.integers(0, 2))
            distance = int(random.integers(0, BEFORE[number].nbytes))
            words[place] = (number, distance)
            expected.append(Pointer(8 * place, number, distance))
        assert compare(*both("<40Q", words), BEFORE, AFTER) == expected


class Kept(Node):
    """A node whose values are seen by the test; it stands in for CUDA's executable graph."""

    def __init__(self, values, kind="kernel", movable=None):
        super().__init__(None, kind, len(values))
        self.values[:] = values
        self.movable = len(values) if movable is None else movable

    def set(self, executable):
        executable.append((self, struct.unpack_from("<Q", self.values.raw)[0]))


def test_nodes_that_read_an_input_are_updated_when_it_moves_and_only_then():
    pairs = [both("<QQ", [(0, 256), 5]), both("<QQ", [1, (1, 0)]), both("<QQ", [(0, 0), (1, 8)])]
    earlier, later = ([Kept(pair[side]) for pair in pairs] for side in (0, 1))
    words, refused = readers(earlier, later, BEFORE, AFTER)
    assert not refused
    homes, executable = [span.start for span in AFTER], []
    graph = Indirection(executable, words, homes)
    assert [graph.num_nodes(numbers) for numbers in ([0], [1], [0, 1], [])] == [2, 2, 3, 0]
    assert graph.point(homes) == 0
    assert graph.point([0x1000, homes[1]]) == 2
    assert executable == [(later[0], 0x1100), (later[2], 0x1000)]
    assert graph.point([0x1000, homes[1]]) == 0
    assert graph.point([0x1000, 0x2000]) == 2
    assert struct.unpack("<QQ", later[2].values.raw) == (0x1000, 0x2008)
    assert graph.point(homes) == 3
    assert [node.values.raw for node in later] == [pair[1] for pair in pairs]


def test_an_update_that_was_interrupted_is_done_again():
    pair = both("<Q", [(0, 0)])
    words, _ = readers([Kept(pair[0])], [Kept(pair[1])], BEFORE[:1], AFTER[:1])

    class Interrupted(list):
        def append(self, what):
            super().append(what)
            if len(self) == 1:
                raise KeyboardInterrupt

    executable = Interrupted()
    graph = Indirection(executable, words, [AFTER[0].start])
    with pytest.raises(KeyboardInterrupt):
        graph.point([0x1000])
    graph.point([AFTER[0].start])  # where it was before: this must not be taken for granted
    assert [address for _, address in executable] == [0x1000, AFTER[0].start]


def test_what_is_not_known_is_refused():
    target = both("<QQ", [9, (0, 0)])  # as a copy that writes to an input
    words, refused = readers([Kept(target[0], movable=8)], [Kept(target[1], movable=8)], BEFORE, AFTER)
    assert "cannot be changed" in refused[0]
    assert words == {1: []}
    one, other = both("<Q", [(0, 0)])
    words, refused = readers([Kept(one)], [Kept(other, kind="another kernel")], BEFORE, AFTER)
    assert not words
    assert set(refused) == {0, 1}
    assert "different work" in refused[0]


def test_parameters_in_one_piece_are_read_as_cuda_documents_them():
    values, size = ctypes.create_string_buffer(bytes(range(21)), 21), ctypes.c_size_t(21)
    start, length = ctypes.addressof(values), ctypes.addressof(size)
    for words in ([1, start, 2, length, 0], [2, length, 1, start, 0]):
        extra = (ctypes.c_void_p * 5)(*words)
        assert _whole(ctypes.addressof(extra)) == bytes(range(21))
    for words in ([0, 0, 0, 0, 0], [1, start, 0, 0, 0], [1, start, 1, start, 0], [1, start, 2, length, 7]):
        extra = (ctypes.c_void_p * 5)(*words)
        with pytest.raises(Unknown, match="a form that is not known"):
            _whole(ctypes.addressof(extra))


def test_a_call_that_the_driver_lacks_is_its_error():
    with pytest.raises(DriverError, match="cuNoSuchFunction"):
        call("cuNoSuchFunction")
