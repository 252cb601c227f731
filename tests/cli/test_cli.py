"""The command line as a user meets it: exit codes, one-line errors, JSON, streaming, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import COMMAND, ON_CPU, called, vattn
from helpers.llama import hf_llama, save_folder

from vattn.cli.info import _source_of
from vattn.cli.main import main
from vattn.cli.text import printable
from vattn.errors import ConfigError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for more tokens than anyone waits for."""
    return save_folder(tmp_path_factory.mktemp("endless"), max_position_embeddings=1_000_000)


def generate_json(capfd: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    assert main(["generate", "--device", "cpu", *map(str, args), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_json_is_one_document(folder: Path) -> None:
    done = vattn(
        "generate", "the fox", "the lazy dog jumps", "--model", folder, "--max-new-tokens", "12", *ON_CPU, "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document.keys() == {
        *(
            "model",
            "device",
            "dtype",
            "attention",
            "temperature",
            "top_k",
            "top_p",
            "seed",
            "system",
            "load_s",
            "requests",
            "memory",
            "speed",
        )
    }
    assert (document["device"], document["dtype"], document["attention"]) == ("cpu", "float32", "sdpa")
    for request, prompt in zip(document["requests"], ["the fox", "the lazy dog jumps"], strict=True):
        assert request["prompt"] == prompt
        assert request["num_new_tokens"] == len(request["tokens"]) <= 12
        assert request["finish_reason"] in ("stop", "length")
    fullest, end = document["memory"]["fullest_step"], document["memory"]["end"]
    assert fullest["num_live_slots"] == 2 + 1  # the decode loop takes one
    assert fullest["mapped_bytes"] == fullest["in_use_bytes"] == fullest["waste_bytes"] + fullest["row_bytes"]
    assert end["num_live_slots"] == end["in_use_bytes"] == 0
    assert end["reserved_bytes"] > end["peak_physical_bytes"] >= fullest["physical_bytes"] > 0
    speed = document["speed"]
    assert speed["decode_tokens_per_s"] > 0
    for phase in ("prefill", "decode"):
        assert speed[f"{phase}_bound_by"] in ("reading", "arithmetic")
        assert speed[f"{phase}_share_of_limit"] == pytest.approx(speed[f"{phase}_limit_s"] / speed[f"{phase}_s"])


def test_attention_by_name(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("the fox", "--model", folder, "--max-new-tokens", "8", "--memory-limit", "64MiB")
    default = generate_json(capfd, *arguments)
    named = generate_json(capfd, *arguments, "--attention", "reference")
    assert (default["attention"], named["attention"]) == ("sdpa", "reference")
    assert named["requests"] == default["requests"]
    for name, message in (
        ("nonesuch", "unknown attention backend 'nonesuch', expected one of flash-attn-3, flash-attn-2, "),
        ("torch-varlen", "attention 'torch-varlen' cannot be used here: needs an NVIDIA GPU"),
    ):
        assert main(["generate", "--device", "cpu", *map(str, arguments), "--attention", name]) == 2
        assert message in capfd.readouterr().err


def test_plain_output_is_lines_and_a_table(folder: Path) -> None:
    done = vattn(
        "generate", "the fox", "a dog", "--model", folder, "--max-new-tokens", "30", "--temperature", "1", *ON_CPU
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr  # neither from the display nor out of the model's mouth
    lines = done.stdout.splitlines()
    assert all(re.match(r"\[[12]\]", line) for line in lines), "stdout carries text only"
    assert lines[:2] == ["[1] > the fox", "[2] > a dog"]
    assert any(line.startswith("[1] ") for line in lines[2:])
    assert any(line.startswith("[2] ") for line in lines[2:])
    (calls,) = (re.findall(r"\d+", line) for line in done.stderr.splitlines() if "driver calls" in line)
    assert int(calls[1]) == sum(map(int, calls[2:])) > 0
    for word in ("reserved", "mapped", "physical", "in use", "wasted", "peak", "driver calls", "prefill", "decode"):
        assert word in done.stderr


def test_quiet_output_is_text(folder: Path) -> None:
    arguments = ["the fox", "--model", folder, "--max-new-tokens", "30", "--raw", *ON_CPU]
    done = vattn("generate", *arguments, "--quiet")
    document = json.loads(called("generate", *arguments, "--json").stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.removesuffix("\n") == printable(document["requests"][0]["text"]).removesuffix("\n")


def test_live_display_on_a_terminal(folder: Path) -> None:
    parent, child = pty.openpty()
    arguments = ["generate", "the fox", "a dog", "--model", str(folder), "--max-new-tokens", "30", *ON_CPU]
    with subprocess.Popen([*COMMAND, *arguments], stdout=child, stderr=subprocess.PIPE) as process:
        os.close(child)
        output = b""
        while chunk := _read(parent):
            output += chunk
        assert process.stderr is not None
        assert b"driver calls" in process.stderr.read()
    os.close(parent)
    assert process.returncode == 0
    for word in (b"tok/s", b"mapped", b"the fox"):
        assert word in output


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_seeds_reproduce(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sampled = ["the fox", "--model", folder, "--max-new-tokens", "20", "--temperature", "1.5", "--top-p", "0.9"]
    first, again, other = (generate_json(capfd, *sampled, "--seed", seed)["requests"] for seed in ("7", "7", "8"))
    assert first == again
    assert first[0]["tokens"] != other[0]["tokens"]
    # the i-th prompt has seed N + i, whoever shares the batch
    pair = generate_json(capfd, "a dog", *sampled, "--seed", "6")["requests"]
    assert pair[1] == first[0]


def test_top_k(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of one token there is no choice, however high the temperature."""
    arguments = ("the fox", "--model", folder, "--max-new-tokens", "20")
    greedy, one, all_of_them = (
        generate_json(capfd, *arguments, *more)["requests"][0]["tokens"]
        for more in (["--top-k", "1", "--top-p", "1"], ["--temperature", "50", "--top-k", "1"], ["--temperature", "50"])
    )
    assert greedy == one != all_of_them


def test_chat_and_raw(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lengths = [
        generate_json(capfd, "the fox", "--model", folder, "--max-new-tokens", "1", *raw)["requests"][0][
            "num_prompt_tokens"
        ]
        for raw in ([], ["--raw"])
    ]
    assert lengths[0] > lengths[1]


def test_more_prompts_than_slots_and_a_tight_limit(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = [f"{'the fox ' * i}and" for i in range(1, 8)]
    free = generate_json(capfd, *prompts, "--model", folder, "--max-new-tokens", "9")
    limits = ["--max-batch", "3", "--memory-limit", "4MiB"]
    tight = generate_json(capfd, *prompts, "--model", folder, "--max-new-tokens", "9", *limits)
    assert [r["tokens"] for r in tight["requests"]] == [r["tokens"] for r in free["requests"]]
    assert tight["memory"]["end"]["peak_physical_bytes"] <= 4 << 20


def test_builtin_prompts(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    requests = generate_json(capfd, "--model", folder, "--max-new-tokens", "1", "--raw")["requests"]
    assert len({r["num_prompt_tokens"] for r in requests}) > 3


def test_prompts_of_stdin_and_of_files(folder: Path, tmp_path: Path) -> None:
    """Those of the command line first; a newline at the end of a file is the file's, not the prompt's."""
    (tmp_path / "one").write_text("the quick\nbrown fox\n")
    (tmp_path / "two").write_bytes(b"\xef\xbb\xbfjumps over\r\n")
    arguments = ["--file", tmp_path / "one", "--file", tmp_path / "two", "--model", folder, "--max-new-tokens", "1"]
    done = vattn("generate", "a dog", "-", *arguments, *ON_CPU, "--json", text="the fox\n\n")
    assert done.returncode == 0, done.stderr
    prompts = [request["prompt"] for request in json.loads(done.stdout)["requests"]]
    assert prompts == ["a dog", "the fox\n", "the quick\nbrown fox", "jumps over"]


def test_stdin_is_not_read_unless_it_is_named(folder: Path) -> None:
    """A cron job has none, and a loop of the shell's reads its own."""
    arguments = ["generate", "the fox", "--model", str(folder), "--max-new-tokens", "1", *ON_CPU]
    with subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.wait(timeout=60) == 0  # although the pipe is open still


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "ABSENT"], "cannot read a prompt from .*: No such file"),
        (["--file", "FOLDER"], "cannot read a prompt from .*: Is a directory"),
        (["--file", "BYTES"], "not valid UTF-8"),
        (["--file", "EMPTY"], "prompt 1 is empty"),
        (["--file", "/dev/zero"], "more than 67108864 bytes"),
        (["--file", "a\0b"], "cannot read a prompt"),
        (["-", "--file", "-"], "can be read once only"),
    ],
)
def test_prompts_that_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "EMPTY").write_text("\n")
    places = {"FOLDER": tmp_path} | {name: tmp_path / name for name in ("ABSENT", "BYTES", "EMPTY")}
    assert main(["generate", *(str(places.get(argument, argument)) for argument in arguments)]) == 2
    captured = capfd.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert re.search(message, captured.err)


def test_system(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("the fox", "--model", folder, "--max-new-tokens", "1")
    plain, told = (generate_json(capfd, *arguments, *more) for more in ([], ["--system", "the lazy dog"]))
    assert told["system"] == "the lazy dog"
    assert told["requests"][0]["num_prompt_tokens"] > plain["requests"][0]["num_prompt_tokens"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_the_gpu(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """bfloat16 by default; in float32 the same tokens as on the CPU."""
    prompts = ["the fox", "the lazy dog jumps", "--model", folder, "--max-new-tokens", "20"]
    assert generate_json(capfd, *prompts, "--device", "cuda")["dtype"] == "bfloat16"
    on_cpu = generate_json(capfd, *prompts)
    on_gpu = generate_json(capfd, *prompts, "--device", "cuda", "--dtype", "float32")
    assert on_gpu["device"] == "cuda:0"
    assert on_gpu["requests"] == on_cpu["requests"]
    assert on_gpu["memory"]["end"]["page_bytes"] == 2 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MODEL", ""], "prompt 1 is empty"),
        (["--model", "MODEL", "fine", " \n"], "prompt 2 is empty"),
        (["--model", "MODEL", "the fox " * 600], r"prompt 1: .* exceed the context of 512"),
        (
            ["--model", "ENDLESS", "fox", "--memory-limit", "2MiB", "--max-new-tokens", "9000"],
            r"need .* limit is 2097152",
        ),
        (["--model", "MODEL", "fox", "--memory-limit", "1MiB"], "at least one page"),
        (["--model", "MODEL", "fox", "--memory-limit", "lots"], "256MiB"),
        (["--model", "MODEL", "fox", "--memory-limit", "0"], "at least one byte"),
        (["--model", "MODEL", "fox", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--model", "MODEL", "fox", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["--model", "MODEL", "fox", "--temperature", "-1"], "temperature"),
        (["--model", "MODEL", "fox", "--top-p", "0"], "--top-p"),
        (["--model", "MODEL", "fox", "--seed", "-1"], "seed"),
        (["fox", "dog", "--model", "MODEL", "--seed", "9223372036854775807"], "seed"),
        (["--model", "MODEL", "fox", "--system", "Moo.", "--raw"], "--system needs the model's chat template"),
        (["--model", "MODEL", "fox", "--attention", "nonesuch"], "unknown attention"),
        (["--model", "MODEL", "fox", "--top-k", "-1"], "--top-k"),
        (["--model", "MODEL", "fox", "--top-k", "2147483648"], "--top-k"),
        (["--model", "ABSENT", "fox", "--top-k", "40"], "--top-k 40 has no effect at temperature 0"),
        (["--model", "ABSENT", "fox", "--top-p", "0.9", "--temperature", "0"], "--top-p 0.9 has no effect"),
        (["--model", "MODEL", "fox", "--max-batch", "0"], "--max-batch"),
        (["--model", "MODEL", "fox", "--device", "tpu"], "tpu"),
        (["--model", "MODEL", "fox", "--device", "cuda:99"], "(?i)cuda"),
        (["--model", "EMPTY", "fox"], "holds no weights"),
        (["--model", "ABSENT", "--attention", "torch-varlen", "fox"], "needs an NVIDIA GPU"),  # before the model
        (["--model", "GPT2", "fox"], r"gpt2: the weights lack, or have in another shape, transformer\.h\.0\."),
        (["--model", "ODD", "fox"], r"unknown architecture .*supported: llama"),
        (["--model", "ABSENT", "fox"], "no model at"),
        (["--dtype", "int3", "fox"], "invalid choice"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_exit_code_2_and_one_line(
    folder: Path,
    endless: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    hf_llama().save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "model_type": "none-such"}))
    places = {
        "MODEL": folder,
        "ENDLESS": endless,
        "EMPTY": tmp_path / "empty",
        "GPT2": tmp_path / "gpt2",
        "ODD": tmp_path / "odd",
        "ABSENT": tmp_path / "absent",
    }
    capfd.readouterr()  # saving the model above draws a progress bar
    device = [] if "--device" in arguments else ["--device", "cpu"]
    code = main(["generate", *(str(places.get(argument, argument)) for argument in arguments), *device])
    captured = capfd.readouterr()
    assert (code, captured.out) == (2, "")
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(captured.err)
    assert captured.err.count("\n") == 1


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    done = vattn("generate", "fox", "--model", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert vattn("--help").returncode == 0


def test_elsewhere_than_linux(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["info"]) == 2
    assert capfd.readouterr().err == "vattn: vattn runs on Linux only, not on darwin\n"


def _start_endless(endless: Path) -> subprocess.Popen[str]:
    arguments = ["--model", str(endless), "--max-new-tokens", "900000", "--temperature", "3", *ON_CPU[:2]]
    return subprocess.Popen(
        [*COMMAND, "generate", "the fox", "a dog", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c(endless: Path) -> None:
    with _start_endless(endless) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("[")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "vattn: interrupted\n")


def test_a_closed_pipe_ends_quietly(endless: Path) -> None:
    """As in ``vattn generate … | head -1``."""
    with _start_endless(endless) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.wait(timeout=60)
        assert (process.returncode, process.stderr.read()) == (1, "")


def test_where_the_choice_of_kernels_comes_from() -> None:
    assert _source_of("A", [], None) == "not measured for this GPU; vattn tune FOLDER measures a model's here"
    assert _source_of("A", ["A"], None) == "as measured on A"
    assert _source_of("A", ["B"], None) == "as measured on B; vattn tune FOLDER measures a model's here"
    assert _source_of("A", ["A", "B"], None).startswith("as measured on A, else on B; ")
    assert _source_of("A", [], "x.json is no tuning table") == "x.json is no tuning table"


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    drivers = {driver["name"]: driver for driver in document["drivers"]}
    assert drivers["host"]["available"]
    assert drivers["host"]["granularity_bytes"] > 0
    assert drivers["cuda"]["available"] or drivers["cuda"]["reason"]
    names = ["flash-attn-3", "flash-attn-2", "torch-varlen", "sdpa", "reference", "triton-decode"]
    assert [backend["name"] for backend in document["attention"]] == names
    assert "GPU" in document["attention"][0]["devices"]["cpu"]["reason"]
    assert {"name": "reference", "over_read_tokens": 0, "masks_over_read": True} in [
        {key: value for key, value in backend.items() if key != "devices"} for backend in document["attention"]
    ]
    assert all(backend["devices"]["cpu"] for backend in document["attention"])
    assert document["packages"]["torch"]
    assert document["models"]["smollm2"]["path"] or "pip install" in document["models"]["smollm2"]["reason"]

    assert main(["info"]) == 0
    text = capfd.readouterr().out
    for word in (
        "driver host",
        "driver cuda",
        "attention sdpa",
        "attention flash-attn-3",
        "model smollm2",
        "torch",
    ):
        assert word in text
