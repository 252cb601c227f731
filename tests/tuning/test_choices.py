"""The store of measured choices: what is found again, by whom, and what becomes of files that are not whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from vattn.errors import ConfigError
from vattn.tuning.choices import EAGER, Choice, Choices, fastest, kept_choices, time_in_turns

KEY = {"kind": "decode step", "model": "FusedLlama, 16 layers", "rows": 2048, "batch": 8}
US = {EAGER: 900.0, "graph": 120.0, "graph + dependent launch": 110.0}


@pytest.fixture
def store(tmp_path: Path) -> Choices:
    return Choices(tmp_path / "folder" / "A_GPU.graphs.json", "A GPU")


def test_what_is_kept_is_found_by_another_process(store):
    assert store.find(KEY) is None
    choice = Choice.of(US, {"graph + persistent": "RuntimeError: no room"})
    store.keep(KEY, choice)
    store.keep({**KEY, "batch": 9}, Choice.of({EAGER: 1.0}))
    code = f"""
from pathlib import Path
from vattn.tuning.choices import Choices
store = Choices(Path({str(store.path)!r}))
choice = store.find({dict(reversed(KEY.items()))!r})
print(choice.way, dict(choice.us), dict(choice.failed), choice.made, store.gpu, sep="|")
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    failed = {"graph + persistent": "RuntimeError: no room"}
    assert child.stdout.strip() == f"graph + dependent launch|{US}|{failed}|{choice.made}|A GPU"
    for other in ({**KEY, "batch": 7}, {**KEY, "batch": "8"}, {**KEY, "more": 1}, {"batch": 8}):
        assert store.find(other) is None


def test_a_later_choice_takes_the_place_of_an_earlier_one(store):
    store.keep(KEY, Choice.of(US))
    store.keep(KEY, Choice.of({EAGER: 100.0, "graph": 120.0}))
    assert store.find(KEY).way == EAGER
    assert len(store.read()[0]) == 1


@pytest.mark.parametrize("name", ["vattn", "torch", "triton", "cuda", "driver"])
def test_choices_of_other_versions_are_measured_again(store, name):
    choice = Choice.of(US)
    assert choice.current
    other = replace(choice, versions={**choice.versions, name: "0.0"})
    store.keep(KEY, other)
    assert store.find(KEY) is None
    assert store.read() == ([(KEY, other)], None), "it is still there to be shown"
    store.keep(KEY, choice)
    assert store.read() == ([(KEY, choice)], None)


def test_forget(store):
    for batch in (1, 2):
        store.keep({**KEY, "batch": batch}, Choice.of(US))
    store.keep({"kind": "module", "batch": 1}, Choice.of(US))
    store.forget({"kind": "decode step", "batch": 1})
    assert [key["batch"] for key, _ in store.read()[0]] == [2, 1]
    store.forget({"kind": "decode step"})
    assert [key["kind"] for key, _ in store.read()[0]] == ["module"]
    Choices(store.path.with_name("none")).forget(KEY)
    assert not store.path.with_name("none").exists()


BROKEN = ["", "{", "[]", "null", '"text"', "{}", '{"choices": {}}', '{"gpu": "A GPU"}', "[" * 100_000, "\x00", "[1]"]


@pytest.mark.parametrize("text", [*BROKEN, None], ids=repr)
def test_a_broken_file_holds_nothing_says_why_and_is_replaced(store, text):
    store.path.parent.mkdir()
    if text is None:
        store.path.write_bytes(b"\xff\xfe\x00")
    else:
        store.path.write_text(text)
    records, reason = store.read()
    assert records == []
    assert str(store.path) in reason
    assert "delete it, or measure again" in reason or "1 of 1 choices cannot be read" in reason
    assert store.find(KEY) is None
    store.keep(KEY, Choice.of(US))
    assert store.find(KEY) == Choice.of(US)
    assert store.read()[1] is None


CHANGES = [
    {"way": "another"}, {"us": {}}, {"us": {EAGER: "fast"}}, {"us": {EAGER: -1.0}}, {"us": {EAGER: float("nan")}},
    {"us": 5}, {"key": {"batch": 1.5}}, {"key": {"batch": True}}, {"key": []}, {"versions": None}, {"failed": [1]},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_a_record_that_is_not_whole_is_left_out(store, change):
    store.keep(KEY, Choice.of(US))
    store.keep({**KEY, "batch": 9}, Choice.of(US))
    document = json.loads(store.path.read_text())
    document["choices"][0] |= {"way": EAGER, "us": {EAGER: 1.0}} | change
    document["choices"].append({"key": KEY})
    store.path.write_text(json.dumps(document))
    records, reason = store.read()
    assert [key["batch"] for key, _ in records] == [9]
    assert reason == f"{store.path}: 2 of 3 choices cannot be read"
    assert store.find(KEY) is None


@pytest.mark.parametrize("key", [{"batch": 1.5}, {"batch": True}, {"batch": None}, {5: "x"}], ids=repr)
def test_what_is_no_key(store, key):
    with pytest.raises(ConfigError, match="texts and whole numbers"):
        store.find(key)
    with pytest.raises(ConfigError, match="texts and whole numbers"):
        store.keep(key, Choice.of(US))


def test_a_choice_is_one_of_those_that_were_timed():
    with pytest.raises(ConfigError, match="none of those that were timed"):
        Choice("graph", {EAGER: 1.0})


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    store = Choices(tmp_path / "file" / "A_GPU.graphs.json")
    with pytest.warns(RuntimeWarning, match="XDG_CACHE_HOME"):
        store.keep(KEY, Choice.of(US))
    assert store.find(KEY) is None


_WRITER = """
import sys
from pathlib import Path
from vattn.tuning.choices import Choice, Choices
store = Choices(Path(sys.argv[1]), "A GPU")
print("ready", flush=True)
sys.stdin.readline()
for batch in range(int(sys.argv[2]), int(sys.argv[2]) + 60):
    store.keep({"batch": batch, "text": "x" * 2000}, Choice.of({"eager": 1.0 + batch}))
"""


def test_two_processes_write_while_a_third_reads(store):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(store.path), str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for first in (0, 1000)
    ]
    try:
        for each in writers:
            assert each.stdout.readline() == b"ready\n"
        for each in writers:
            each.stdin.write(b"\n")
            each.stdin.flush()
        seen = set()
        while any(each.poll() is None for each in writers):
            records, reason = store.read()
            assert reason is None, "a reader saw a part of a file"
            seen.add(len(records))
        assert [each.wait() for each in writers] == [0, 0]
    finally:
        for each in writers:
            each.kill()
            each.communicate()
    assert len(seen) > 5, "it was not read while it was written"
    records, reason = store.read()
    assert reason is None
    assert sorted(key["batch"] for key, _ in records) == [*range(60), *range(1000, 1060)]
    assert all(choice.us[EAGER] == 1.0 + key["batch"] for key, choice in records)
    assert {path.name for path in store.path.parent.iterdir()} == {"A_GPU.graphs.json", "A_GPU.graphs.lock"}


def test_the_files_of_all_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept_choices() == []
    folder = tmp_path / "vattn" / "tuned"
    for name in ("B GPU", "A GPU"):
        Choices(folder / f"{name.replace(' ', '_')}.graphs.json", name).keep(KEY, Choice.of(US))
    (folder / "A_GPU.json").write_text("{}")
    found = kept_choices()
    for each in found:
        each.read()
    assert [each.gpu for each in found] == ["A GPU", "B GPU"]


@pytest.mark.parametrize(
    ("us", "way"),
    [
        ({EAGER: 100.0, "graph": 100.0}, EAGER),
        ({EAGER: 100.0, "graph": 99.5}, EAGER),
        ({EAGER: 100.0, "graph": 98.0}, "graph"),
        ({EAGER: 100.0, "graph": 140.0}, EAGER),
        ({EAGER: 900.0, "graph": 100.9, "graph + persistent": 100.0}, "graph"),
        ({EAGER: 900.0, "graph": 102.0, "graph + persistent": 100.0}, "graph + persistent"),
        ({EAGER: 101.5, "graph": 100.8, "graph + persistent": 100.0}, "graph"),
        ({"graph": 5.0}, "graph"),
    ],
)
def test_ties_go_to_the_way_that_is_listed_before(us, way):
    assert fastest(us) == way
    assert us[way] <= 1.01 * min(us.values())


def test_launches_are_timed_in_turns_and_the_median_is_taken():
    events, clock = [], [0.0]
    took = {"a": iter([3.0, 0.0, 50.0, 0.0, 4.0, 0.0]), "b": iter([0.0, 9.0, 0.0, 7.0, 0.0, 8.0])}

    def launch(name: str) -> None:
        events.append(name)
        clock[0] += next(took[name])

    launches = {name: partial(launch, name) for name in took}
    us = time_in_turns(launches, lambda: events.append("wait"), rounds=3, in_a_row=2, clock=lambda: clock[0])
    assert us == pytest.approx({"a": 4e6 / 2, "b": 8e6 / 2})
    assert events == ["wait", "a", "a", "wait", "wait", "b", "b", "wait"] * 3


def test_the_real_clock_tells_fast_from_slow():
    us = time_in_turns({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.001)}, lambda: None, rounds=3)
    assert us["slow"] >= 20_000
    assert us["fast"] >= 1000
    assert fastest(us) == "fast"
