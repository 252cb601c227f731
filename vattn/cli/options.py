"""The options of the ``vattn`` command, and the values that they accept."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import ConfigError

__all__ = ["parse_bytes", "parse_whole", "parser"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DTYPES = ("float32", "bfloat16", "float16")
GRAPHS = ("always", "measure", "first use", "never")  # as vattn.decode.graphs.MODES, without importing torch
_INT64_MAX = 2**63 - 1
_FLOAT32_MAX = 3.4028234663852886e38


def parse_bytes(text: str) -> int:
    """``"256MiB"``, ``"1.5 GiB"``, ``"2GB"`` or plain bytes -> bytes.

    Raises:
        ConfigError: anything else, less than one byte, or more than 2**63 - 1.
    """
    # Python converts no more than 4,300 digits; no memory has 30.
    match = re.fullmatch(r"([0-9]{1,29})(\.[0-9]+)?\s*([a-zA-Z]*)", text.strip())
    unit = _UNITS.get(match[3].upper(), 0) if match else 0
    size = int(match[1]) * unit + int(float(match[2] or 0) * unit) if match else 0
    if not 1 <= size <= _INT64_MAX:
        accepted = "a size of at least one byte and below 8388608TiB, such as 256MiB, 2GiB or 1000000"
        raise ConfigError(f"expected {accepted}, got {_short(text)}")
    return size


def parse_whole(text: str, minimum: int, maximum: int = _INT64_MAX) -> int:
    """Digits -> int.

    Raises:
        ConfigError: anything but digits, or a number out of range.
    """
    if re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()) and minimum <= int(text) <= maximum:
        return int(text)
    upper = "below 2**63" if maximum == _INT64_MAX else f"at most {maximum}"
    raise ConfigError(f"expected a whole number of at least {minimum} and {upper}, got {_short(text)}")


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:40]!r} and {len(text) - 40} characters more"


def _value(parse: Callable[[str], object]) -> Callable[[str], object]:
    """``parse`` for argparse, which shows the message of an ArgumentTypeError only."""

    def value(text: str) -> object:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return value


def _whole(minimum: int) -> Callable[[str], object]:
    return _value(lambda text: parse_whole(text, minimum))


def _real(accepted: str, is_accepted: Callable[[float], bool]) -> Callable[[str], object]:
    def parse(text: str) -> float:
        try:
            number = float(text) if text.isascii() and "_" not in text else float("nan")
        except ValueError:
            number = float("nan")
        if not is_accepted(number):  # nothing is true of NaN
            raise ConfigError(f"expected {accepted}, got {_short(text)}")
        return number

    return _value(parse)


class _OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is a ConfigError without the usage text, and help that cannot be written is an error."""

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from .. import __version__

        print(f"vattn {__version__}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its errors are ConfigError."""
    top = _OneLineParser(prog="vattn", description="Language models on a KV cache mapped page by page.")
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="generate | chat | serve | tune | bench | info"
    )

    generate = commands.add_parser("generate", help="continue prompts", description="Continue one or several prompts.")
    add = generate.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="one or several; - reads one from stdin; none: built-in questions")
    add("--file", action="append", default=[], metavar="FILE", help="a prompt that is in a file; may be given often")
    _add_sampling(generate, "the i-th prompt samples with seed N + i", 128)
    _add_model(generate)
    add("--max-batch", type=_whole(1), metavar="N", help="prompts computed together (default: all, at most 64)")
    add("--raw", action="store_true", help="continue the prompts as they stand, without the model's chat template")
    output = generate.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    output.add_argument("--quiet", action="store_true", help="print the new text and nothing else")

    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model, a line at a time. Ctrl-C stops an answer, Ctrl-D ends the conversation.",
    )
    _add_sampling(chat, "the i-th answer samples with seed N + i", 1024)
    _add_model(chat)
    chat.add_argument("--quiet", action="store_true", help="print the answers and nothing else")

    _add_serve(
        commands.add_parser(
            "serve",
            help="answer OpenAI's HTTP interface",
            description="Serve a model over HTTP, as OpenAI does. The options have vLLM's names where it has them.",
        )
    )

    tune = commands.add_parser(
        "tune",
        help="time decode kernels on this GPU",
        description="Time the kernels of decode steps for models' shapes on this GPU; decode loops then use what won.",
    )
    add = tune.add_argument
    add("models", nargs="+", metavar="FOLDER", help="with a model's config.json; weights are not needed")
    add("--dtype", choices=_DTYPES[1:], default="bfloat16", help="of weights and cache (default: bfloat16)")
    add("--batches", default="1,2,4,8,16,32,64", metavar="N,N", help="batch sizes (default: 1,2,4,8,16,32,64)")
    add("--contexts", default="1024,4096,16384", metavar="N,N", help="for attention (default: 1024,4096,16384)")

    bench = commands.add_parser(
        "bench",
        help="repeat the experiments",
        description="Run the repository's experiments, and write their tables and plots anew.",
    )
    add = bench.add_argument
    add("names", nargs="*", metavar="NAME", help="as capacity or 05")
    add("--all", action="store_true", help="all that this machine can run")
    add("--quick", action="store_true", help="fewer cases and repeats; prints tables and changes no record")
    add("--folder", metavar="FOLDER", help="of the experiments (default: ./experiments, or that beside the package)")

    info = commands.add_parser(
        "info",
        help="what this machine offers, or what a model needs",
        description="Drivers, devices and backends; or, of a model, how many sequences fit in a memory; or, with "
        "--graphs, which ways of running a step were measured as fastest.",
    )
    add = info.add_argument
    models = "smollm2, a folder with config.json, or a .gguf file; reads no weights"
    add("model", nargs="?", metavar="MODEL", help=models)
    _add_place(info)
    graphs = "the ways of running a step that DecodeLoop(graphs='measure') timed on any GPU, or those in FILE"
    add("--graphs", nargs="?", const="", metavar="FILE", help=graphs)
    add("--json", action="store_true", help="print one JSON document and nothing else")
    return top


def _add_serve(command: argparse.ArgumentParser) -> None:
    port = _value(lambda text: parse_whole(text, 0, 65535))
    seconds = _real("a number of seconds above 0", lambda number: 0 < number <= _FLOAT32_MAX)
    add = command.add_argument
    add("model", nargs="?", default="smollm2", help="smollm2, a folder, or a .gguf file (default: smollm2)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=port, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    add("--api-key", action="append", metavar="KEY", help="clients must send it; may be given often ($VATTN_API_KEY)")
    add("--no-api-key", action="store_true", help="let everybody in who can reach the address")
    add("--served-model-name", action="append", metavar="NAME", help="for clients; may be given often (default: MODEL)")
    add("--max-model-len", type=_whole(2), metavar="N", help="tokens of prompt and answer (default: the most possible)")
    add("--max-num-seqs", type=_whole(1), default=64, metavar="N", help="answers computed together (default: 64)")
    add("--max-num-batched-tokens", type=_whole(1), metavar="N", help="of prompts in a step (default: as Engine)")
    add("--max-queue", type=_whole(1), default=256, metavar="N", help="answers that wait; more get 429 (default: 256)")
    add("--request-timeout", type=seconds, default=600.0, metavar="S", help="a request ends after it (default: 600)")
    add(
        "--max-body-size",
        type=_value(parse_bytes),
        default=8 << 20,
        metavar="SIZE",
        help="of requests (default: 8MiB)",
    )
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: info)")
    add("--graphs", choices=GRAPHS, help="of decode; measure: the fastest way on this GPU (default: always, on a GPU)")
    _add_place(command)
    add("--attention", metavar="NAME", help="a backend that `vattn info` lists (default: the best for each phase)")


def _add_sampling(command: argparse.ArgumentParser, seeds: str, max_new_tokens: int) -> None:
    temperature = _real("a finite number of at least 0", lambda number: 0 <= number <= _FLOAT32_MAX)
    top_p = _real("a number above 0 and at most 1", lambda number: 0 < number <= 1)
    top_k = _value(lambda text: parse_whole(text, 0, 2**31 - 1))
    for option, kind, default, letter, text in (
        ("--max-new-tokens", _whole(1), max_new_tokens, "N", "of each answer (default: %(default)s)"),
        ("--temperature", temperature, 0.0, "T", "0 takes the most likely token (default: 0)"),
        ("--top-p", top_p, 1.0, "P", "sample from this share of the mass, at a temperature above 0 (default: 1)"),
        ("--top-k", top_k, 0, "K", "sample from this many of the likeliest tokens, as --top-p (default: 0, all)"),
        ("--seed", _whole(0), 0, "N", f"{seeds} (default: 0)"),
    ):
        command.add_argument(option, type=kind, default=default, metavar=letter, help=text)
    system = "what the model is told before the conversation (default: the model's own)"
    command.add_argument("--system", metavar="TEXT", help=system)


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", default="smollm2", metavar="NAME", help="smollm2, a folder, or a .gguf file (default: smollm2)")
    _add_place(command)
    add("--attention", metavar="NAME", help="a backend that `vattn info` lists (default: the best for each phase)")


def _add_place(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:i (default: cuda if there is one, else cpu)")
    add("--dtype", choices=_DTYPES, help="of weights and cache (default: bfloat16 on cuda, float32 on cpu)")
    limit = "physical memory for the cache, as 256MiB (default: 90 %% of what is free)"
    add("--memory-limit", type=_value(parse_bytes), metavar="SIZE", help=limit)
