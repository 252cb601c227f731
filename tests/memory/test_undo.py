"""All or nothing: steps are taken back in reverse, and a step that cannot be is not the end of it."""

from __future__ import annotations

import pytest

from vattn.memory.undo import Undo


def run(undo, *steps, error=None):
    """A transaction of these steps, which then fails or not."""
    with undo:
        for step in steps:
            undo.push(*step)
        if error:
            raise error


def test_nothing_is_undone_without_an_exception():
    done = []
    run(Undo(lambda: done.append("incomplete")), (done.append, 1))
    assert done == []


def test_steps_are_undone_backwards_and_the_exception_goes_on():
    done = []
    with pytest.raises(KeyError):
        run(Undo(lambda: done.append("incomplete")), (done.append, 1), (done.append, 2), error=KeyError())
    assert done == [2, 1]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_undone_too(interruption):
    done = []
    with pytest.raises(interruption):
        run(Undo(), (done.append, 1), error=interruption())
    assert done == [1]


def test_a_failing_step_does_not_stop_the_others_and_is_noted():
    done = []

    def fail(name):
        raise OSError(f"cannot take back {name}")

    undo = Undo(lambda: done.append("incomplete"))
    with pytest.raises(KeyError) as caught:
        run(undo, (done.append, 1), (fail, "two"), (done.append, 3), error=KeyError())
    assert done == [3, 1, "incomplete"]
    assert any("cannot take back two" in note for note in caught.value.__notes__)


def test_steps_are_forgotten_after_success():
    done = []
    undo = Undo()
    run(undo, (done.append, 1))
    with pytest.raises(KeyError):
        run(undo, error=KeyError())
    assert done == []
