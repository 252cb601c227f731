"""Parts of the command line on their own: sizes, what reaches the terminal, how many threads."""

from __future__ import annotations

import io
import os
import time
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from vattn.cli.display import LineDisplay, LiveDisplay
from vattn.cli.options import parse_bytes, parse_whole, parser
from vattn.cli.report import format_bytes, show
from vattn.cli.text import one_line, printable
from vattn.cli.threads import num_threads
from vattn.errors import ConfigError
from vattn.stats import CacheStats

pytest.importorskip("transformers")


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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "1e9",
        "12 parsecs",
        "0",
        "0.0001B",
        "1_000",
        "٣MiB",
        "9" * 5000,
        "9" * 400 + ".5GiB",
        "8388608TiB",
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["", "-1", "1.5", "1e3", "1_000", "٣", "nan", "9" * 5000, "9223372036854775808"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_whole(text, 0)
    assert len(str(caught.value)) < 200
    for option in ("--max-new-tokens", "--seed", "--max-batch"):
        with pytest.raises(ConfigError, match=option):
            parser().parse_args(["generate", option, text])


def test_whole_numbers() -> None:
    assert [parse_whole(text, 0) for text in ("0", "+7", " 12 ", "9223372036854775807")] == [0, 7, 12, 2**63 - 1]


@pytest.mark.parametrize("text", ["nan", "inf", "-0.1", "1_0", "٣", "1e999", "9" * 5000, ""])
def test_real_numbers_that_are_none(text: str) -> None:
    for option in ("--temperature", "--top-p"):
        with pytest.raises(ConfigError, match=option) as caught:
            parser().parse_args(["generate", option, text])
        assert len(str(caught.value)) < 200


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
    assert one_line("a\x1b]0;title\x07\nb") == "a�]0;title� b"


def test_characters_that_hide_or_reorder_do_not_either() -> None:
    hidden = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, *range(0xE0000, 0xE0080)]
    hidden = [code for code in hidden if code == 0xE0001 or not 0xE0000 <= code < 0xE0020]  # the rest are unassigned
    for code in (*hidden, 0xFEFF, 0x2060, 0x2028, 0x2029, 0xD800, 0xDFFF):
        assert printable(f"a{chr(code)}b") == "a�b", hex(code)
    for text in ("👩\u200d💻", "می\u200cخواهم", "soft\u00adhyphen", "❤️", "\u06dd", "e\u0301"):
        assert printable(text) == text


def test_tables_are_as_wide_as_they_are_where_there_is_no_terminal() -> None:
    table = Table(box=None, show_header=False)
    table.add_row("name", "word " * 100 + "end")
    table.add_row("other", "short")
    written = io.StringIO()
    show(written, table)
    lines = written.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("end")
    assert lines[1].endswith("short")


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


@pytest.mark.parametrize("kind", ["live", "lines"])
def test_a_long_text_is_shown_in_linear_time(kind: str) -> None:
    """A step's cost grew with the texts: of 64 prompts of 2,000 tokens it was more than a GPU's decode step."""

    def seconds(num_steps: int) -> float:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            console = Console(file=nowhere, force_terminal=True, width=100, height=50)
            display = LiveDisplay(console, ["a", "b"]) if kind == "live" else LineDisplay(["a", "b"])
            stats = CacheStats(**{field.name: 0 for field in fields(CacheStats)})
            with display:
                start = time.thread_time()
                for step in range(num_steps):
                    for index in range(2):
                        display.add(index, " word")
                    display.progress(step, stats)
                return time.thread_time() - start

    assert min(seconds(30_000) for _ in range(2)) < 40 * min(seconds(3_000) for _ in range(2))


def test_what_a_live_display_shows(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w+") as file:
        with LiveDisplay(Console(file=file, force_terminal=True, width=40, height=50), ["one", "two"]) as display:
            for word in range(500):
                display.add(0, f" {word}")
                display.add(1, "\nfox\x1b[2J")
            rows = display._render()
            display.finish(0)
        file.seek(0)
        written = file.read()
    screen = Console(width=40)
    with screen.capture() as capture:
        screen.print(rows)
    first, second, status = (line.rstrip() for line in capture.get().splitlines())
    assert first.startswith("1 …")
    assert first.endswith(" 497 498 499")
    assert second.endswith("fox�[2J fox�[2J")
    assert status == "waiting for the first token"
    assert " ".join(map(str, range(8))) in written
    assert "\x1b[2J" not in written
