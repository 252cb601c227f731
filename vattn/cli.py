"""The ``vattn`` command: ``generate``, ``tune``, ``bench`` and ``info``.

Exit codes: 0, 1 when the machine failed us, 2 when the caller must change something, 130 on Ctrl-C. Errors are one line
on stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from .errors import ConfigError, VattnError

__all__ = ["main", "parse_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        if not sys.platform.startswith("linux"):
            raise ConfigError(f"vattn runs on Linux only, not on {sys.platform}")
        args = _parser().parse_args(argv)
        if args.command == "generate":
            from .cli_generate import generate

            generate(args)
        elif args.command == "bench":
            from .cli_bench import bench

            bench(args)
        elif args.command == "tune":
            from .cli_tune import tune

            tune(args)
        else:
            from .cli_info import info

            info(args)
        sys.stdout.flush()
    except ConfigError as error:
        return _fail(2, error)
    except (VattnError, MemoryError) as error:
        return _fail(1, error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch to name it would slow --help down
            raise
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk behind stdout, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(1, error)
    return 0


def parse_bytes(text: str) -> int:
    """``"256MiB"``, ``"1.5 GiB"``, ``"2GB"`` or plain bytes -> bytes.

    Raises:
        ConfigError: anything else, or nothing at all of it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"expected a size such as 256MiB, 2GiB or 1000000, got {text!r}")
    size = (
        int(float(match[1]) * _UNITS[match[2].upper()]) if "." in match[1] else int(match[1]) * _UNITS[match[2].upper()]
    )
    if size < 1:
        raise ConfigError(f"expected a size of at least one byte, got {text!r}")
    return size


class _OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text before each error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _OneLineParser(prog="vattn", description="Language models on a KV cache mapped page by page.")
    parser.add_argument("--version", action="version", version=f"vattn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate | tune | bench | info")

    generate = commands.add_parser("generate", help="continue prompts", description="Continue one or several prompts.")
    add = generate.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="one or several at once; none: a few built-in questions")
    add("--model", default="smollm2", metavar="NAME", help="smollm2, a folder, or a .gguf file (default: smollm2)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default: 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from this share of the mass (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="the i-th prompt samples with seed N + i (default: 0)")
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:i (default: cuda if there is one, else cpu)")
    add("--dtype", choices=_DTYPES, help="of weights and cache (default: bfloat16 on cuda, float32 on cpu)")
    add(
        "--memory-limit",
        metavar="SIZE",
        help="physical memory for the cache, as 256MiB (default: 90 %% of what is free)",
    )
    add("--attention", metavar="NAME", help="a backend that `vattn info` lists (default: the best for each phase)")
    add("--max-batch", type=int, metavar="N", help="prompts computed together (default: all, at most 64)")
    add("--raw", action="store_true", help="continue the prompts as they stand, without the model's chat template")
    add("--json", action="store_true", help="print one JSON document and nothing else")

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
    add("names", nargs="*", metavar="NAME", help="as capacity or 05 (default: all that this machine can run)")
    add("--quick", action="store_true", help="fewer cases and repeats; prints tables and changes no record")
    add("--folder", metavar="FOLDER", help="of the experiments (default: ./experiments, or that beside the package)")

    info = commands.add_parser("info", help="what this machine offers", description="Drivers, devices and backends.")
    info.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def _fail(code: int, reason: object) -> int:
    text = " ".join(str(reason).split()).encode("utf-8", "replace").decode()
    print(f"vattn: {text}", file=sys.stderr)
    return code
