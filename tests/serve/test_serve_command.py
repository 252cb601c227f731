"""``vattn serve`` as a process: its ready line, its signals, what it refuses to start with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers.cli import COMMAND, ON_CPU, called

from vattn.errors import ConfigError
from vattn.models.loader import find

LONG: dict[str, Any] = {"prompt": "the fox", "stream": True, "ignore_eos": True, "temperature": 0}


@contextmanager
def serving(folder: Path | str, *options: str, **more: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it is ready."""
    command = [*COMMAND, "serve", str(folder), "--port", "0", *ON_CPU, *options]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **more)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("vattn: serving "), process.communicate(timeout=60)
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return urllib.request.urlopen(request, timeout=120)


def is_open(url: str) -> bool:
    host, port = url.split("/")[2].split(":")
    try:
        socket.create_connection((host, int(port)), timeout=60).close()
    except ConnectionError:
        return False
    return True


def until_closed(url: str) -> None:
    end = time.monotonic() + 60
    while is_open(url):
        assert time.monotonic() < end


def test_a_signal_drains(folder: Path) -> None:
    with serving(folder, "--served-model-name", "fox") as (process, url):
        with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["fox"]
        idle = socket.create_connection((url.split("/")[2].split(":")[0], int(url.split("/")[2].split(":")[1])))
        with idle, ask(url, {**LONG, "max_tokens": 1500, "stream_options": {"include_usage": True}}) as stream:
            stream.readline()
            process.send_signal(signal.SIGTERM)
            events = [line for line in stream if line.strip()]
        assert events[-1] == b"data: [DONE]\n"
        assert json.loads(events[-2][6:])["usage"]["completion_tokens"] == 1500
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log
        assert "Traceback" not in log


def test_a_second_signal_ends(folder: Path) -> None:
    with serving(folder) as (process, url), ask(url, {**LONG, "max_tokens": 90_000}) as stream:
        stream.readline()
        process.send_signal(signal.SIGTERM)
        until_closed(url)
        assert stream.readline() + stream.readline()  # it goes on
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 1, log
        assert log.endswith("vattn: a second signal cut off 1 request\n")
        assert "Traceback" not in log


def test_a_key_of_the_environment_and_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_API_KEY", "a-secret")
    with serving(folder, "--max-model-len", "64") as (process, url):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, LONG)
        assert refused.value.code == 401
        request = urllib.request.Request(f"{url}/models", headers={"Authorization": "Bearer a-secret"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["data"][0]["max_model_len"] == 64
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 130, log
        assert log.endswith("vattn: interrupted\n")
        assert "a-secret" not in log


def test_what_it_does_not_start_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VATTN_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, said in (
            (["--host", "0.0.0.0"], "give an --api-key, or --no-api-key"),
            (["--host", "::"], "give an --api-key, or --no-api-key"),
            (["--host", "no.such.host.invalid"], "is no address"),
            (["--host", "203.0.113.7"], "cannot listen"),
            (["--port", port], "cannot listen"),
            (["--port", "70000"], "at most 65535"),
            (["--api-key", "two words"], "printable ASCII without spaces"),
            (["--api-key", ""], "printable ASCII without spaces"),
            (["--api-key", "a", "--no-api-key"], "give one of them"),
            (["--served-model-name", ""], "--served-model-name must be a name"),
            (["--served-model-name", "a\nb"], "--served-model-name must be a name"),
            (["--max-model-len", "100001"], "--max-model-len 100001 exceeds the 100000 tokens"),
            (["--request-timeout", "nan"], "a number of seconds above 0"),
        ):
            done = called("serve", folder, *ON_CPU, *options)
            assert (done.returncode, done.stdout) == (2, ""), done.stderr
            assert said in done.stderr
            assert done.stderr.count("\n") == 1


def test_without_the_packages(folder: Path) -> None:
    script = (
        "import sys; sys.modules['fastapi'] = None\n"
        f"from vattn.cli.main import main; sys.exit(main(['serve', {str(folder)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "needs the package fastapi: pip install '.[hf,serve]'" in done.stderr


def test_the_model_that_comes_as_a_package() -> None:
    try:
        find("smollm2")
    except ConfigError as reason:
        if os.environ.get("VATTN_REQUIRE_MODEL"):
            raise
        pytest.skip(str(reason))
    question = {"role": "user", "content": "What is the capital of France? Answer in one word."}
    with serving("smollm2", "--max-model-len", "512") as (_, url):
        client = openai.OpenAI(base_url=url, api_key="none", timeout=300)
        asked: dict[str, Any] = {"model": "smollm2", "messages": [question], "temperature": 0, "max_tokens": 12}
        whole = client.chat.completions.create(**asked).choices[0]
        chunks = client.chat.completions.create(**asked, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.message.content == text
    assert "Paris" in text
    assert whole.finish_reason == "stop"
