"""The soak test itself: it passes over a cache that leaks nothing, and says what a leaking one leaks."""

from __future__ import annotations

import mmap
import os

import pytest
import soak

import vattn

# In a short run on a machine that others use too timings say little, and the middle third may still warm things up.
SHORT = soak.TOLERANCES | {
    "MiB resident": (1.0, 16.0),
    "mappings": (1.0, 100.0),
    "us ensure p50": (9.0, 100.0),
    "us release p50": (9.0, 500.0),
}


def run(device: str, lines: int = 9) -> int:
    return soak.main(["--minutes", str(lines * 0.1 / 60), "--device", device], 0.1, SHORT)


def test_nothing_grows(device, capsys):
    assert run(device, 15) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("nothing grew\n")
    assert " 0 handles" in printed
    assert " 0 times out of pages" not in printed


def fresh_memory(size: int) -> mmap.mmap:
    """Of the system: a process that has freed much would find room for an ordinary object without growing."""
    memory = mmap.mmap(-1, size)
    memory[:] = b"x" * size
    return memory


LEAKS = {
    "MiB resident": lambda cache: fresh_memory(1 << 20),
    "descriptors": lambda cache: os.open("/dev/null", os.O_RDONLY),
    "handles": lambda cache: cache.driver.create(cache.page_bytes),
    "objects": lambda cache: [[] for _ in range(100)],
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_release_leaks_is_named(name, monkeypatch, capsys):
    release, close, kept = vattn.KVCache.release, vattn.KVCache.close, []

    def leaking(cache: vattn.KVCache, slot: int) -> None:
        release(cache, slot)
        kept.append(LEAKS[name](cache))

    def clearing(cache: vattn.KVCache) -> None:
        for each in kept if name in ("handles", "descriptors") else ():
            cache.driver.release(each) if name == "handles" else os.close(each)
        kept.clear()
        close(cache)

    monkeypatch.setattr(vattn.KVCache, "release", leaking)
    monkeypatch.setattr(vattn.KVCache, "close", clearing)
    if name == "handles":  # else this one sees it first
        monkeypatch.setattr(vattn.KVCache, "check_integrity", lambda cache: None)
    assert run("cpu") == 1
    assert f"{name} grew from" in capsys.readouterr().out


@pytest.mark.parametrize("name", soak.TOLERANCES)
def test_the_last_third_is_held_against_the_middle_third(name):
    factor, more = soak.TOLERANCES[name]
    lines = [dict.fromkeys(soak.TOLERANCES, 10.0) for _ in range(9)]
    lines[0][name], lines[8][name] = 0.0, 1e9  # neither the first third nor one line out of three decides
    lines[6][name] = lines[7][name] = 10 * factor + more
    assert soak.what_grew(lines) == []
    lines[6][name] = lines[7][name] = 10 * factor + more + 0.1
    (what,) = soak.what_grew(lines)
    assert what.startswith(f"{name} grew from 10.0 to ")


def test_a_row_that_somebody_else_writes_is_seen(monkeypatch):
    ensure = vattn.KVCache.ensure

    def scribbling(cache: vattn.KVCache, slot: int, seq_len: int) -> None:
        ensure(cache, slot, seq_len)
        cache.v(1)[slot, 0] = -1.0

    monkeypatch.setattr(vattn.KVCache, "ensure", scribbling)
    with pytest.raises(AssertionError, match="not as they were written"):
        run("cpu")


def test_too_short_a_run_says_so():
    with pytest.raises(AssertionError, match="too few"):
        run("cpu", 2)
