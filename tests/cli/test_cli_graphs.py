"""``vattn info --graphs`` as a user meets it: files of this machine's GPU and of others, whole and broken."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vattn.cli.main import main
from vattn.cli.options import GRAPHS
from vattn.decode.graphs import MODES
from vattn.tuning.choices import Choice, Choices, choices_for

WAYS = ("eager", "graph", "graph + dependent launch", "graph + persistent")
SHAPE = {
    "kind": "decode step",
    "model": "FusedLlama of LlamaConfig, 16 layers of 2048, 32 heads, 8 KV heads of 64, vocabulary 128256, bfloat16",
    "attention": "triton-decode",
    "rows": 2048,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vattn" / "tuned"


@pytest.fixture
def store(folder: Path) -> Choices:
    """Of a GPU that this machine has not."""
    store = Choices(folder / "Some_GPU.graphs.json", "Some GPU")
    store.keep({**SHAPE, "batch": 16}, Choice.of(dict(zip(WAYS, (2000.0, 800.0, 790.0, 900.0), strict=True))))
    store.keep({**SHAPE, "batch": 2}, Choice.of(dict(zip(WAYS, (2000.0, 600.0, 500.0, 400.0), strict=True))))
    store.keep({**SHAPE, "batch": 4}, Choice.of({"eager": 100.0, "graph": 150.0}, {WAYS[3]: "RuntimeError: no\x1b[2J"}))
    return store


def shown(capfd: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["info", "--graphs", *args]) == 0
    return capfd.readouterr().out


def test_modes_of_a_server_are_those_of_a_loop():
    assert GRAPHS == MODES


def test_nothing_was_measured_yet(folder, capfd):
    assert 'DecodeLoop(model, cache, graphs="measure")' in shown(capfd)
    document = json.loads(shown(capfd, "--json"))
    assert document["versions"]["torch"] == torch.__version__
    assert [each["choices"] for each in document["files"]] == [[]] * torch.cuda.is_available()
    assert not folder.exists()


@pytest.mark.parametrize("named", [False, True])
def test_another_gpu_s_file(store, named, capfd):
    arguments = [str(store.path)] if named else []
    text = shown(capfd, *arguments)
    for fact in ("Some GPU", str(store.path), SHAPE["model"], "triton-decode", f"torch {torch.__version__}"):
        assert fact in text
    assert "\x1b" not in text
    assert re.search(r"failed +graph \+ persistent, batch 4: RuntimeError: no\N{REPLACEMENT CHARACTER}\[2J", text)
    lines = [" ".join(line.split()) for line in text.splitlines() if re.match(r" +\d", line)]
    assert lines == [
        "2 2000.0 +400 % 600.0 +50 % 500.0 +25 % 400.0 chosen",
        "4 100.0 chosen 150.0 +50 % failed",
        "16 2000.0 +153 % 800.0 +1 % 790.0 chosen 900.0 +14 %",
    ]
    (file,) = [each for each in json.loads(shown(capfd, *arguments, "--json"))["files"] if each["gpu"] == "Some GPU"]
    assert (file["path"], file["here"], file["reason"]) == (str(store.path), False, None)
    assert [each["key"]["batch"] for each in file["choices"]] == [2, 4, 16]
    first = file["choices"][0]
    assert first["way"] == "graph + persistent"
    assert first["us"] == {"eager": 2000.0, "graph": 600.0, WAYS[2]: 500.0, WAYS[3]: 400.0}
    assert first["slower_percent"] == {"eager": 400.0, "graph": 50.0, WAYS[2]: 25.0, WAYS[3]: 0.0}
    assert first["current"] is None, "whether another machine's software is the same is not known"


def test_choices_of_modules_have_a_line_for_each_signature(folder, capfd):
    store = Choices(folder / "Some_GPU.graphs.json", "Some GPU")
    for size in (8, 64):
        key = {"kind": "module", "module": "Encoder", "signature": f"float32[2, {size}]"}
        store.keep(key, Choice.of({"eager": 100.0, "graph": 50.0, "indirect": 44.0}))
    text = shown(capfd, str(store.path))
    assert "batch" not in text
    assert text.count("Encoder") == 1
    assert re.search(r"float32\[2, 64\] +100\.0 \+127 % +50\.0 +\+14 % +44\.0 chosen\n", text)


def test_a_broken_file_beside_a_whole_one(store, folder, capfd):
    (folder / "Broken.graphs.json").write_text("{")
    text = shown(capfd)
    assert re.search(r"broken +\S+Broken\.graphs\.json holds no choices .*delete it", text)
    assert "400.0 chosen" in text
    reasons = [each["reason"] for each in json.loads(shown(capfd, "--json"))["files"] if not each["here"]]
    assert ["delete it" in (reason or "") for reason in reasons] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graphs", "nowhere.json"], "no file of choices at nowhere.json"),
        (["smollm2", "--graphs"], "leave MODEL out"),
    ],
)
def test_what_cannot_be_asked(arguments, message, capfd):
    assert main(["info", *arguments]) == 2
    output = capfd.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_four_ways_fit(store, columns):
    """No figure is broken into two lines or cut."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "vattn", "info", "--graphs", str(store.path)]
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    child = subprocess.Popen(command, stdout=follower, stderr=subprocess.STDOUT, env=environment)
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 4096):
            output += chunk
    except OSError:  # the terminal's other end is closed
        pass
    finally:
        os.close(leader)
    assert child.wait(timeout=60) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).splitlines()
    assert max(map(len, lines)) <= columns
    assert any(re.search(r"2  2000\.0 \+400 % +600\.0 +\+50 % +500\.0 +\+25 % +400\.0 chosen", line) for line in lines)


@pytest.mark.gpu
def test_this_gpu_s_file(folder, capfd):
    gpu = torch.cuda.get_device_name()
    assert f"{gpu}, this machine" in shown(capfd)
    store, choice = choices_for(torch.device("cuda")), Choice.of({"eager": 5.0, "graph": 1.0})
    store.keep({**SHAPE, "batch": 2}, choice)
    store.keep({**SHAPE, "batch": 3}, replace(choice, versions={**choice.versions, "torch": "1.0"}))
    assert "torch 1.0, " in shown(capfd)
    assert shown(capfd).count("not today's, measured again") == 1
    (file,) = json.loads(shown(capfd, "--json"))["files"]
    assert file["here"]
    assert {each["key"]["batch"]: each["current"] for each in file["choices"]} == {2: True, 3: False}
