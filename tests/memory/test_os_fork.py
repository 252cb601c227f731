"""Children of ``os.fork``: they are told that the cache is their parent's, take nothing with them, and can go on."""

from __future__ import annotations

import subprocess
import sys

import pytest

_REFUSES = """
def refuses(call):
    try:
        call()
    except vattn.ConfigError as error:
        assert "process" in str(error), error
    else:
        raise AssertionError("a forked child used the cache")
"""


def run(script, *arguments):
    """In a process of its own, whose end is the children's too; the script has ``refuses``."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _REFUSES + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


_FORK = """
import os, sys, torch, vattn
cache = vattn.KVCache(vattn.KVLayout(2, 2, 64, 4096, torch.float32), 4, sys.argv[1], 64 << 20)
slot = cache.acquire()
cache.ensure(slot, 3000)
view = cache.rows(slot, 1)[0].fill_(7.0)
if (pid := os.fork()) == 0:
    calls = (cache.stats, cache.acquire, lambda: cache.ensure(slot, 4000), lambda: cache.release(slot), cache.trim)
    for call in (*calls, lambda: cache.k(0), lambda: cache.fork(slot), lambda: cache.truncate(slot, 1)):
        refuses(call)
    cache.close()  # has nothing to close here
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert view.eq(7.0).all()
cache.ensure(slot, 4096)
cache.check_integrity()
"""


def test_a_forked_child_is_told_so_and_takes_nothing_with_it(device):
    run(_FORK, device)


_FORK_BESIDE = """
import os, signal, sys, threading, time, torch, vattn, vattn.interrupts
layout = vattn.KVLayout(2, 2, 64, 4096, torch.float32)
busy, idle = (vattn.KVCache(layout, 4, sys.argv[1], 64 << 20) for _ in range(2))
held, go_on = threading.Event(), threading.Event()

def inside():
    with busy._lock.lock, vattn.interrupts.Uninterrupted():  # as in every operation
        held.set()
        go_on.wait()

worker = threading.Thread(target=inside)
worker.start()
held.wait()
if (pid := os.fork()) == 0:
    signal.alarm(60)
    refuses(busy.stats), refuses(busy.acquire), refuses(idle.stats)
    busy.close()
    with vattn.KVCache(layout, 4, "cpu", 64 << 20) as mine:
        mine.ensure(mine.acquire(), 3000)
    sys.exit(0)
status = os.waitpid(pid, 0)[1]
go_on.set()
worker.join()
assert status == 0, status
"""


# compute-sanitizer dies at the end of a child of several threads; where that ends by os._exit, all of it goes through.
@pytest.mark.unsanitized
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_is_in_the_cache(device):
    """Its lock is held by a thread that the child does not have."""
    run(_FORK_BESIDE, device)


_FORK_IN_A_HANDLER = """
import os, signal, sys, threading, vattn.interrupts
before, caught = signal.getsignal(signal.SIGINT), []
noting, done = threading.Event(), threading.Event()

def fork():
    noting.wait()
    if (pid := os.fork()) == 0:
        os._exit(signal.getsignal(signal.SIGINT) is not before)
    caught.append(os.waitpid(pid, 0)[1])
    done.set()

thread = threading.Thread(target=fork)
thread.start()
with vattn.interrupts.Uninterrupted():
    noting.set()
    done.wait()
thread.join()
assert caught == [0], caught
"""


def test_a_child_forked_by_a_thread_can_be_interrupted():
    """The main thread, which it does not have, was putting Ctrl-C off."""
    run(_FORK_IN_A_HANDLER)
