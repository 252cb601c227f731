"""The command line as a user meets it: exit codes, one-line errors, JSON, streaming, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_helpers import hf_llama, save_folder

from vattn.cli import main, parse_bytes
from vattn.cli_display import printable
from vattn.cli_report import format_bytes
from vattn.cli_threads import num_threads
from vattn.errors import ConfigError
from vattn.models import LlamaConfig
from vattn.models.fused_llama import products
from vattn.tuning import TuningTable

pytest.importorskip("transformers")

COMMAND = [sys.executable, "-m", "vattn"]
ON_CPU = ["--device", "cpu", "--memory-limit", "256MiB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for more tokens than anyone waits for."""
    return save_folder(tmp_path_factory.mktemp("endless"), max_position_embeddings=1_000_000)


def vattn(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120)


def generate_json(capfd: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    assert main(["generate", "--device", "cpu", *map(str, args), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_tune_without_a_gpu_and_wrong_arguments(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["tune", str(folder / "nowhere")], "config.json"),
        (["tune", str(folder), "--batches", "1,x"], "--batches"),
        (["tune", str(folder), "--contexts", "0"], "--contexts"),
        (["tune"], "FOLDER"),
    ]
    if not torch.cuda.is_available():
        cases.append((["tune", str(folder)], "needs an NVIDIA GPU"))
    for arguments, message in cases:
        assert main(arguments) == 2
        output = capfd.readouterr()
        assert message in output.err
        assert output.err.count("\n") == 1
        assert output.out == ""


@pytest.mark.gpu
def test_tune(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["tune", str(folder), "--batches", "1,3", "--contexts", "200"]) == 0
    (path,) = (tmp_path / "vattn" / "tuned").glob("*.json")
    table = TuningTable.read(path)
    assert str(path) in capfd.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    for outputs, inputs, kind in products(LlamaConfig.from_hf(config)):
        found = [
            r for r in table.linear if (r["outputs"], r["inputs"], r["swiglu"]) == (outputs, inputs, kind == "swiglu")
        ]
        assert {record["tokens"] for record in found} == {1, 3}
        assert all(0 < record["us"] <= record["cublas_us"] for record in found)
    ours = [record for record in table.attention if record["context"] == 200]
    assert {record["batch"] for record in ours} == {1, 3}
    assert all(record["backend"] in record["us"] for record in ours)
    assert len(table.linear) > 20, "the shipped measurements were lost"


# Generate -----------------------------------------------------------------------------------------------------------


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
            "top_p",
            "seed",
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
    assert fullest["num_live_slots"] == 2
    assert fullest["mapped_bytes"] == fullest["in_use_bytes"] == fullest["waste_bytes"] + fullest["row_bytes"]
    assert end["num_live_slots"] == end["in_use_bytes"] == 0
    assert end["reserved_bytes"] > end["peak_physical_bytes"] >= fullest["physical_bytes"] > 0
    assert document["speed"]["decode_tokens_per_s"] > 0


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
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout  # neither from the display nor out of the model's mouth
    lines = done.stdout.splitlines()
    assert any(line.startswith("[1] ") for line in lines)
    assert any(line.startswith("[2] ") for line in lines)
    for word in ("reserved", "mapped", "physical", "in use", "wasted", "peak", "driver calls", "prefill", "decode"):
        assert word in done.stdout


def test_live_display_on_a_terminal(folder: Path) -> None:
    parent, child = pty.openpty()
    arguments = ["generate", "the fox", "a dog", "--model", str(folder), "--max-new-tokens", "30", *ON_CPU]
    with subprocess.Popen([*COMMAND, *arguments], stdout=child, stderr=subprocess.PIPE) as process:
        os.close(child)
        output = b""
        while chunk := _read(parent):
            output += chunk
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(parent)
    assert process.returncode == 0
    for word in (b"tok/s", b"mapped", b"the fox", b"driver calls"):
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


# Errors -------------------------------------------------------------------------------------------------------------


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
        (["--model", "MODEL", "fox", "--top-p", "0"], "top_p"),
        (["--model", "MODEL", "fox", "--seed", "-1"], "seed"),
        (["--model", "MODEL", "fox", "--max-batch", "0"], "--max-batch"),
        (["--model", "MODEL", "fox", "--device", "tpu"], "tpu"),
        (["--model", "MODEL", "fox", "--device", "cuda:99"], "(?i)cuda"),
        (["--model", "EMPTY", "fox"], "holds no weights"),
        (["--model", "GPT2", "fox"], r"unknown architecture .*supported: llama"),
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
    places = {
        "MODEL": folder,
        "ENDLESS": endless,
        "EMPTY": tmp_path / "empty",
        "GPT2": tmp_path / "gpt2",
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


# Info and the small parts -------------------------------------------------------------------------------------------


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    drivers = {driver["name"]: driver for driver in document["drivers"]}
    assert drivers["host"]["available"]
    assert drivers["host"]["granularity_bytes"] > 0
    assert drivers["cuda"]["available"] or drivers["cuda"]["reason"]
    names = ["flash-attn-3", "flash-attn-2", "torch-varlen", "sdpa", "reference"]
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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("256MiB", 256 << 20),
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("2GB", 2 * 10**9),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e9", "12 parsecs", "0", "0.0001B"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (3 << 20, "3.0 MiB"), (5 << 40, "5.0 TiB"), (1 << 53, "8192.0 TiB")],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_control_characters_do_not_reach_the_terminal() -> None:
    """A model may write an escape sequence; it must not clear the screen or set a window title."""
    assert printable("a\x1b[2Jb\x07c\x9bd\r\x7f") == "a�[2Jb�c�d��"
    assert printable("line\n\ttab → 🦊") == "line\n\ttab → 🦊"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/of/the/host\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n1:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        (
            {
                f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}\n"
                for i in range(8)
            },
            4,
        ),
    ],
)
def test_threads_within_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_threads(tmp_path) == expected
