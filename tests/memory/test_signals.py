"""Handlers of signals: put off while something is done, put back, and called for what came, whatever raises."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest
from helpers.stream_driver import StreamDriver
from test_streams import LAYOUT, PAGE

import vattn
from vattn import interrupts
from vattn.interrupts import Uninterrupted

# Makes a signal pending. Its handler runs at the next place where Python runs handlers, not in the call.
trip = ctypes.pythonapi.PyErr_SetInterruptEx


@pytest.fixture(autouse=True)
def as_before():
    """Handlers are as they were, and no block is open, also where a test fails."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    interrupts._block = None
    interrupts._came.clear()
    interrupts._replaced.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def raises(number, frame):
    raise TimeoutError


def test_a_handler_that_is_set_in_an_operation_stays():
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    with Uninterrupted():
        signal.signal(signal.SIGUSR1, raises)
    assert signal.getsignal(signal.SIGUSR1) is raises


def test_no_signal_is_lost_while_handlers_are_put_off(monkeypatch):
    """The handler of one that came is called although another's, which is in place still, raises."""
    came = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    signal.signal(signal.SIGUSR2, raises)
    note, getsignal = signal.getsignal(signal.SIGINT), signal.getsignal

    def both(number):
        if number == signal.SIGUSR2:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGUSR2)
        return getsignal(number)

    monkeypatch.setattr(signal, "getsignal", both)
    with pytest.raises(TimeoutError), Uninterrupted():
        raise AssertionError("begun all the same")
    assert came == [signal.SIGINT]
    assert getsignal(signal.SIGINT) is note


def test_a_handler_may_use_a_cache_while_another_signal_still_waits():
    """It sets that one's handler back to the default, and begins operations of its own."""
    came = []

    def first(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        cache.release(cache.acquire())
        came.append(number)

    with vattn.KVCache(LAYOUT, 2, memory_limit=64 * PAGE, page_bytes=PAGE, driver=StreamDriver()) as cache:
        signal.signal(signal.SIGINT, first)
        signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert not came
    assert sorted(came) == [signal.SIGINT, signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_all_handlers_are_called_although_each_of_them_raises():
    came = []

    def note_and_raise(number, frame):
        came.append(number)
        raise TimeoutError(number)

    for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, note_and_raise)

    def block():
        with Uninterrupted():
            for number in (signal.SIGUSR2, signal.SIGALRM, signal.SIGUSR1):
                signal.raise_signal(number)

    with pytest.raises(TimeoutError):
        block()
    assert came == [signal.SIGUSR2, signal.SIGALRM, signal.SIGUSR1]
    assert all(signal.getsignal(number) is note_and_raise for number in came)


def test_a_signal_that_comes_a_thousand_times_in_a_block_is_handled_once():
    came = []
    signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    with Uninterrupted():
        for _ in range(1000):
            signal.raise_signal(signal.SIGUSR1)
        assert not came
    assert came == [signal.SIGUSR1]
    with Uninterrupted():
        pass
    assert came == [signal.SIGUSR1]


def test_two_signals_at_once_do_not_put_handlers_off_for_good(monkeypatch):
    """The handler of the second runs where the error that the first one's raised is handled, and raises too."""
    raised, reached = [], []

    def fail(number, frame):
        raised.append(number)
        if len(raised) == 1:
            (_,) = pending  # makes the second one pending; not a call, after which its handler would run at once
        raise TimeoutError

    class Numbers:
        """SIGALRM comes before its handler is replaced."""

        def __iter__(self):
            return (trip(number) or number for number in [signal.SIGALRM])

    def block():
        with Uninterrupted():
            signal.raise_signal(signal.SIGALRM)
            reached.append(True)

    pending = map(trip, [signal.SIGALRM])
    signal.signal(signal.SIGALRM, fail)
    monkeypatch.setattr(interrupts, "SIGNALS", Numbers())
    with pytest.raises(TimeoutError) as kept, Uninterrupted():  # its traceback keeps the block
        raise AssertionError("begun all the same")
    monkeypatch.undo()
    assert len(raised) == 2
    with pytest.raises(TimeoutError):
        block()
    del kept
    assert reached, "the handler ran inside the block"
    assert signal.getsignal(signal.SIGALRM) is fail


@pytest.mark.parametrize("where", ["as a block begins", "as it ends"])
def test_a_handler_that_raises_where_they_are_put_back_leaves_none_behind(monkeypatch, where):
    """It runs where the function begins that puts them back."""
    others = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in others]
    for number in (signal.SIGALRM, signal.SIGUSR2):
        signal.signal(number, raises)
    end, getsignal, calls = interrupts._end, signal.getsignal, []

    def begins_late():
        calls.append(True)
        if len(calls) == 1:
            trip(signal.SIGALRM)
        end()

    def raises_in_the_last(number):
        if number == signal.SIGUSR2:
            monkeypatch.setattr(signal, "getsignal", getsignal)
            signal.raise_signal(number)
        return getsignal(number)

    monkeypatch.setattr(interrupts, "_end", begins_late)
    if where == "as a block begins":
        monkeypatch.setattr(signal, "getsignal", raises_in_the_last)
    with pytest.raises(TimeoutError), Uninterrupted():
        assert where == "as it ends"
    assert len(calls) == 2
    assert [signal.getsignal(number) for number in others] == before
    assert signal.getsignal(signal.SIGALRM) is raises


@pytest.mark.parametrize("then", [signal.SIG_DFL, raises])
def test_a_handler_that_sets_another_as_it_is_replaced_has_its_way(monkeypatch, then):
    """The first Ctrl-C asks, the second one kills: the handler sets the default back."""
    getsignal = signal.getsignal

    def asks(number, frame):
        signal.signal(number, then)

    def just_before(number):
        found = getsignal(number)
        if number == signal.SIGUSR1:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGUSR1)
        return found

    signal.signal(signal.SIGUSR1, asks)
    monkeypatch.setattr(signal, "getsignal", just_before)
    with Uninterrupted():
        inside = signal.getsignal(signal.SIGUSR1)
    assert inside is (then if then is signal.SIG_DFL else interrupts._note)
    assert signal.getsignal(signal.SIGUSR1) is then


def test_a_handler_of_an_earlier_operation_does_not_come_back(monkeypatch):
    """Another was set between two operations, and the second one is given up as it begins."""
    signal.signal(signal.SIGUSR1, raises)
    with Uninterrupted():
        pass
    signal.signal(signal.SIGUSR1, newest := (lambda number, frame: None))
    getsignal = signal.getsignal

    def interrupted(number):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return getsignal(number)

    monkeypatch.setattr(signal, "getsignal", interrupted)
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        raise AssertionError("begun all the same")
    assert signal.getsignal(signal.SIGUSR1) is newest


def test_a_block_whose_end_was_lost_is_over_when_it_is_gone():
    """As where an exception of another thread comes where ``end`` begins."""
    came = []
    signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    block = Uninterrupted()
    block.begin()
    del block
    signal.raise_signal(signal.SIGUSR1)
    assert came == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is not interrupts._note
    Uninterrupted().begin()
    with Uninterrupted():
        signal.raise_signal(signal.SIGUSR1)
        assert len(came) == 1
    assert len(came) == 2


def test_what_stood_in_for_a_handler_calls_it_wherever_it_is_kept():
    """Somebody saw it in place, and put it back later."""
    came = []
    signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    with Uninterrupted():
        stand_in = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    signal.signal(signal.SIGUSR1, stand_in)
    with Uninterrupted():
        signal.raise_signal(signal.SIGUSR1)
        assert not came
    assert came == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is not stand_in
    signal.signal(signal.SIGUSR1, stand_in)
    signal.raise_signal(signal.SIGUSR1)
    assert len(came) == 2


def test_a_signal_during_a_fork_leaves_both_processes_able_to_go_on():
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(50):
            child = os.fork()
            if child == 0:
                with Uninterrupted(), interrupts.GarbageWaits():
                    pass
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            with Uninterrupted(), interrupts.GarbageWaits():
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_child_that_is_forked_in_a_block_handles_signals_at_once():
    came = []
    signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    with Uninterrupted():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGUSR1)
            os._exit(0 if came else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
