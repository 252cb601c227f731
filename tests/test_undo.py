"""All or nothing: steps are taken back in reverse, and a step that cannot be is not the end of it."""

from __future__ import annotations

import pytest

from vattn.undo import Undo


def test_nothing_is_undone_without_an_exception():
    done = []
    with Undo(lambda: done.append("incomplete")) as undo:
        undo.push(done.append, 1)
    assert done == []


def test_steps_are_undone_backwards_and_the_exception_goes_on():
    done = []
    with pytest.raises(KeyError), Undo(lambda: done.append("incomplete")) as undo:
        undo.push(done.append, 1)
        undo.push(done.append, 2)
        raise KeyError
    assert done == [2, 1]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_undone_too(interruption):
    done = []
    with pytest.raises(interruption), Undo() as undo:
        undo.push(done.append, 1)
        raise interruption
    assert done == [1]


def test_a_failing_step_does_not_stop_the_others_and_is_noted():
    done = []

    def fail(name):
        raise OSError(f"cannot take back {name}")

    with pytest.raises(KeyError) as caught, Undo(lambda: done.append("incomplete")) as undo:
        undo.push(done.append, 1)
        undo.push(fail, "two")
        undo.push(done.append, 3)
        raise KeyError
    assert done == [3, 1, "incomplete"]
    assert any("cannot take back two" in note for note in caught.value.__notes__)


def test_steps_are_forgotten_after_success():
    done = []
    undo = Undo()
    with undo:
        undo.push(done.append, 1)
    with pytest.raises(KeyError), undo:
        raise KeyError
    assert done == []
