"""The command line where streams are closed or full, where text is hostile, and when signals come."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers.cli import ON_CPU, called, in_shell, on_terminal
from helpers.llama import save_folder

pytest.importorskip("transformers")
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
HOSTILE = "\x1b]0;owned\x07\x1b[2Jfox\u202eevil\U000e0041"


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for more tokens than anyone waits for."""
    return save_folder(tmp_path_factory.mktemp("endless"), max_position_embeddings=1_000_000)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("vattn info >&-", 1, "vattn: stdout is closed: there is nowhere to write to\n"),
        ("vattn --help >&-", 1, "vattn: stdout is closed: there is nowhere to write to\n"),
        ("vattn nonsense >&- 2>&-", 1, ""),
        ("vattn nonsense 2>&-", 2, ""),
        ("vattn nonsense 2>/dev/full", 2, ""),
        ("vattn info --json >/dev/full", 1, "vattn: [Errno 28] No space left on device\n"),
        ("vattn --help >/dev/full", 1, "vattn: [Errno 28] No space left on device\n"),
        ("vattn --version >/dev/full", 1, "vattn: [Errno 28] No space left on device\n"),
        ("vattn generate - <&-", 2, "vattn: stdin is closed: there is no prompt to read\n"),
        ("vattn chat <&-", 2, "vattn: stdin is closed: there are no messages to read\n"),
    ],
)
def test_closed_and_full_streams(command: str, code: int, message: str) -> None:
    done = in_shell(command)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", message)


def test_an_encoding_that_lacks_a_letter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    done = in_shell(f"PYTHONIOENCODING=ascii vattn info '{tmp_path}/ü'")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = in_shell("PYTHONIOENCODING=ascii vattn info")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("place", ["--model", "--attention", "--device", "--file"])
def test_hostile_text_in_an_error(place: str) -> None:
    done = called("generate", "fox", *ON_CPU[2:], place, HOSTILE)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "fox" in done.stderr
    assert not set("\x1b\x07\u202e\U000e0041") & set(done.stderr)


def test_hostile_text_of_a_file_in_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b]0;owned\\u0007\\u202e"}')
    done = called("info", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not set("\x1b\x07\u202e") & set(done.stderr)


def test_hostile_prompts_in_the_live_view(endless: Path) -> None:
    with on_terminal("generate", HOSTILE, "--model", endless, "--max-new-tokens", "5", *ON_CPU) as terminal:
        output = terminal.read_to_the_end().decode()
    assert "fox" in output
    for sequence in ("\x1b]0;", "\x1b[2J", "\x07", "\u202e", "\U000e0041"):
        assert sequence not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_leave_the_cursor_shown(endless: Path, number: signal.Signals) -> None:
    arguments = ["generate", "fox", "--model", endless, "--max-new-tokens", "900000", *ON_CPU[:2]]
    with on_terminal(*arguments) as terminal:
        terminal.read_until(b"tok/s")
        terminal.process.send_signal(number)
        output = terminal.read_to_the_end()
    assert output.rindex(SHOW) > output.rfind(HIDE)
    assert terminal.process.returncode == -number


def test_a_stop_shows_the_cursor_and_going_on_hides_it(endless: Path) -> None:
    arguments = ["generate", "fox", "--model", endless, "--max-new-tokens", "900000", *ON_CPU[:2]]
    with on_terminal(*arguments) as terminal:
        terminal.read_until(HIDE)
        terminal.read_until(b"tok/s")
        # Not Ctrl-Z's own signal: where no shell is there to go on, as here, the kernel ignores it.
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.read_until(SHOW)
        terminal.read_until(HIDE)
        terminal.process.send_signal(signal.SIGINT)
        output = terminal.read_to_the_end()
    assert output.rindex(SHOW) > output.rfind(HIDE)
    assert terminal.process.returncode == 130


def test_a_signal_that_is_ignored_stays_ignored(endless: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_terminal("generate", "fox", "--model", endless, "--max-new-tokens", "900000", *ON_CPU[:2]) as terminal:
            terminal.read_until(b"tok/s")
            os.kill(terminal.process.pid, signal.SIGHUP)
            terminal.read_until(b"tok/s")
            terminal.process.send_signal(signal.SIGINT)
            terminal.read_to_the_end()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert terminal.process.returncode == 130
