"""What goes wrong in reading inputs where they are: then they are copied, outputs are right, and nothing leaks."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers.graph_calls import Function, floats, indirect, same

from vattn import DriverError
from vattn.graphs import graph, make_capturable, nodes

pytestmark = pytest.mark.gpu


def fail_updates(monkeypatch, at):
    """Have the updates of nodes fail whose numbers are in ``at``. Returns a list that grows with each update."""
    updates, call = [], nodes.call

    def failing(name, *arguments):
        if name.startswith("cuGraphExec"):
            updates.append(name)
            if len(updates) - 1 in at:
                raise DriverError(name, "CUDA_ERROR_INVALID_VALUE")
        return call(name, *arguments)

    monkeypatch.setattr(nodes, "call", failing)
    return updates


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_update_leaves_the_copy_and_right_outputs(monkeypatch, failing):
    made = indirect(lambda x, y: (x.sin() + y.cos()) * x.exp(), floats(64, 64), floats(64, 64, seed=1))
    kept = [floats(64, 64, seed=seed) for seed in range(4)]
    same(made, kept[0], kept[1])
    updates = fail_updates(monkeypatch, {failing})
    same(made, kept[2], kept[3])
    assert len(updates) == failing + 1
    (signature,) = made.report.signatures
    assert signature.choice == "graph"
    assert "CUDA_ERROR_INVALID_VALUE" in signature.copied[0]
    for number in range(4):
        same(made, kept[number], kept[3 - number])
    assert len(updates) == failing + 1  # it does not try again
    made.capture(*kept[:2])
    assert made.report.signatures[0].choice == "indirect"
    same(made, kept[3], kept[0])


def test_failures_while_it_is_made_leave_copies_and_leak_nothing(monkeypatch):
    free = []
    for at in (*range(8), 0, 1, 2):
        with monkeypatch.context() as patch:
            fail_updates(patch, {at})
            made = make_capturable(Function(lambda x: x.sin() + x), (floats(1 << 20),), choice="measured")
            assert made.report.num_graphs <= 1
        with torch.no_grad():
            for seed in (1, 2):
                x = floats(1 << 20, seed=seed)
                torch.testing.assert_close(made(x), x.sin() + x)
        made.undo()
        del made, x
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.memory_allocated())
    assert free[-1] == free[1]


@pytest.mark.parametrize("missing", ["cuGraphGetNodes", "cuGraphKernelNodeGetParams", "GetParamInfo"])
def test_a_driver_that_cannot_tell_leaves_the_copy(monkeypatch, missing):
    call = nodes.call

    def lacking(name, *arguments):
        if missing in name:
            raise DriverError(name, "CUDA_ERROR_NOT_SUPPORTED")
        return call(name, *arguments)

    monkeypatch.setattr(nodes, "call", lacking)
    made = indirect(lambda x: x + 1, floats(64, 64), copied=(0,))
    assert missing in made.report.signatures[0].copied[0]
    same(made, floats(64, 64, seed=1))


@pytest.mark.parametrize("missed", [0, 1])
def test_an_address_that_was_missed_is_found_out(monkeypatch, missed):
    """As where it lies in a form that the comparison of words does not know."""

    readers = graph.readers

    def missing(*given):
        words, refused = readers(*given)
        assert [len(found) for found in words.values()] == [2, 2]
        del words[missed][1]
        return words, refused

    monkeypatch.setattr(graph, "readers", missing)
    made = indirect(lambda x, y: x.sin() * x + y.cos() * y, floats(64, 64), floats(64, 64, seed=1), copied=(missed,))
    assert "gave other outputs" in made.report.signatures[0].copied[0]
    for seed in (2, 3):
        same(made, floats(64, 64, seed=seed), floats(64, 64, seed=seed + 5))
