"""The garbage collector waits while something is captured, and is on afterwards: with forks, threads, interrupts."""

from __future__ import annotations

import gc
import os
import signal
import threading

import pytest

from vattn import interrupts
from vattn.interrupts import GarbageWaits, Uninterrupted


def test_garbage_waits_until_the_last_of_the_blocks_ends():
    assert gc.isenabled()
    outer, inner = GarbageWaits(), GarbageWaits()
    with outer:
        assert not gc.isenabled()
        with pytest.raises(ValueError, match="mine"), inner:
            raise ValueError("mine")
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_the_user_turned_off_stays_off():
    gc.disable()
    try:
        with GarbageWaits():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_child_that_is_forked_in_a_block_collects_and_can_open_another():
    block = GarbageWaits()
    block.__enter__()
    child = os.fork()
    if child == 0:
        collects = gc.isenabled()
        block.__exit__(None, None, None)  # goes on where it was forked
        with GarbageWaits():
            waits = not gc.isenabled()
        os._exit(0 if collects and waits and gc.isenabled() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not gc.isenabled()
    block.__exit__(None, None, None)
    assert gc.isenabled()


def test_a_child_of_a_process_without_the_collector_has_none_either():
    with GarbageWaits():
        pass
    gc.disable()
    try:
        child = os.fork()
        if child == 0:
            os._exit(1 if gc.isenabled() else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        gc.enable()


def test_a_child_that_is_forked_as_a_block_begins_collects(monkeypatch):
    """By another thread, between any two lines."""
    disable = gc.disable

    def then_forks():
        disable()
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    monkeypatch.setattr(gc, "disable", then_forks)
    with GarbageWaits():
        assert not gc.isenabled()


def test_forks_beside_threads_that_open_blocks_leave_the_collector_on():
    stop = threading.Event()

    def opens():
        while not stop.is_set():
            with GarbageWaits():
                pass

    threads = [threading.Thread(target=opens) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            child = os.fork()
            if child == 0:
                signal.alarm(10)  # where it waits for what a thread held
                with GarbageWaits():
                    pass
                os._exit(0 if gc.isenabled() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert gc.isenabled()


def test_handlers_that_raise_leave_the_collector_on():
    interruptions = 0

    def block():
        with Uninterrupted(), GarbageWaits():
            pass

    def raises(number, frame):
        """Only where the block catches it: neither in this test's own lines, nor in what the collector calls."""
        code = frame.f_code
        if code is not block.__code__ and code.co_filename not in (interrupts.__file__, signal.__file__):
            return
        while frame is not None and frame.f_code is not block.__code__:
            frame = frame.f_back
        if frame is not None:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raises)
    signal.setitimer(signal.ITIMER_REAL, 0.00005, 0.00005)
    try:
        while interruptions < 100:
            try:
                block()
            except KeyboardInterrupt:
                interruptions += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert gc.isenabled()
    assert interrupts._block is None
