"""``vattn chat``: a conversation of lines, and on a terminal."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.cli import ON_CPU, called, on_terminal, vattn
from helpers.llama import save_folder

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("endless"), max_position_embeddings=1_000_000)


def num_prompt_tokens(errors: str) -> list[int]:
    return [int(found) for found in re.findall(r"\((\d+) \+ \d+ of at most", errors)]


def test_lines_are_messages_and_the_history_goes_along(folder: Path) -> None:
    arguments = ["--model", folder, "--max-new-tokens", "10", *ON_CPU]
    talk = vattn("chat", *arguments, text="the fox\n\nthe dog\n")
    assert talk.returncode == 0
    assert len(num_prompt_tokens(talk.stderr)) == 2
    first, second = num_prompt_tokens(talk.stderr)
    alone = json.loads(called("generate", "the fox", *arguments, "--json").stdout)["requests"][0]
    assert first == alone["num_prompt_tokens"]
    assert second > first + alone["num_new_tokens"], "the second prompt holds the first message and its answer"
    quiet = called("chat", *arguments, "--quiet", text="the fox\n")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert talk.stdout.startswith(quiet.stdout)


def test_system_comes_first(folder: Path) -> None:
    arguments = ["--model", folder, "--max-new-tokens", "2", *ON_CPU]
    plain, told = (
        num_prompt_tokens(called("chat", *arguments, *system, text="the fox\n").stderr)
        for system in ([], ["--system", "the lazy dog"])
    )
    assert told > plain


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(folder: Path) -> None:
    message = "the fox jumps " * 20
    talk = called("chat", "--model", folder, "--max-new-tokens", "40", *ON_CPU, text=f"{message}\n" * 8)
    assert talk.returncode == 0
    assert "turns are forgotten" in talk.stderr
    assert len(num_prompt_tokens(talk.stderr)) == 8
    assert max(num_prompt_tokens(talk.stderr)) < 512


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("the fox " * 600 + "\n", [], r"leaves no room for an answer"),
        ("the fox\n", ["--memory-limit", "1MiB"], r"at least one page"),
        ("the fox\n", ["--attention", "nonesuch"], r"unknown attention"),
        ("the fox\n", ["--top-p", "0.5"], r"--top-p 0.5 has no effect at temperature 0"),
    ],
)
def test_what_cannot_be_answered(folder: Path, text: str, options: list[str], message: str) -> None:
    done = called("chat", "--model", folder, "--device", "cpu", *options, text=text)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.search(message, done.stderr)


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    done = called("chat", "--model", save_folder(tmp_path, chat=False), *ON_CPU, text="the fox\n")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no chat template" in done.stderr


def test_a_template_that_refuses(tmp_path: Path) -> None:
    save_folder(tmp_path)
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no \x1b[2J system') }}{% endif %}x"
    for path in tmp_path.glob("chat_template*"):
        path.write_text(template)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if "chat_template" in config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    for command in (["chat"], ["generate", "fox"]):
        done = called(*command, "--model", tmp_path, *ON_CPU, "--system", "moo", text="the fox\n")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "chat template cannot be used" in done.stderr
        assert "\x1b" not in done.stderr


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(endless: Path) -> None:
    arguments = ["chat", "--model", endless, "--max-new-tokens", "900000", "--temperature", "3", *ON_CPU[:2]]
    with on_terminal(*arguments) as terminal:
        terminal.read_until(b"> ")
        terminal.type("the fox\n")
        terminal.read_until(b"the fox\r\n")
        terminal.read_some()
        terminal.process.send_signal(signal.SIGINT)
        assert b"stopped" in terminal.read_until(b"> ")
        time.sleep(0.5)  # as a person would: between showing the prompt and waiting for a key, readline misses a signal
        terminal.process.send_signal(signal.SIGINT)  # at the prompt it drops the line
        terminal.read_until(b"> ")
        terminal.type("\x04")
        terminal.read_to_the_end()
    assert terminal.process.returncode == 0
