"""``vattn generate``: prompts in, text out, and what it cost in pages."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine import Engine, Request, Sampling
from ..errors import ConfigError
from .display import Display, display_for
from .model import Place, loaded_model, opened_cache, place_for
from .report import Meter, memory_table, show
from .speed import ModelWork, StepTimes, measure_limits, speed_table, throughput

if TYPE_CHECKING:
    from ..attention import AttentionBackend
    from ..models import Tokenizer

__all__ = ["generate", "require_text"]

_MAX_BATCH = 64
_LARGEST_PROMPT_BYTES = 1 << 26  # more than any context; /dev/zero has no end

# Without prompts: short and long, so that the table shows sequences of different lengths sharing the memory.
_DEMO_PROMPTS = (
    "Hi! Who are you?",
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "List five animals that live in a forest, one per line.",
    "Explain to a child why the sky is blue.",
    "A programmer's cache keeps the keys and values of every token it has seen. Each new token adds one row, each "
    "finished conversation gives its rows back, and nobody knows beforehand how long a conversation will be. Explain "
    "in three sentences why reserving the longest possible conversation for everyone wastes memory.",
)


@dataclass
class _Answer:
    """One prompt and what became of it."""

    prompt: str
    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "text": "".join(self.pieces),
            "num_prompt_tokens": len(self.prompt_tokens),
            "num_new_tokens": len(self.tokens),
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
        }


def generate(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ConfigError: an argument, prompt, model, device or limit that cannot work; before any text is written.
    """
    prompts = _prompts(args)
    require_sampling(args)
    place = place_for(args)

    from vattn.models.loader import load_tokenizer

    start = time.perf_counter()
    tokenizer = load_tokenizer(place.path)
    answers = [_Answer(prompt, _encode(tokenizer, prompt, args)) for prompt in prompts]
    meter, times = Meter(), StepTimes()
    max_batch = min(len(prompts), args.max_batch or _MAX_BATCH)
    with loaded_model(place) as model, opened_cache(place, model, max_batch) as cache:
        load_s = time.perf_counter() - start
        with Engine(model, cache, attention=place.attention) as engine:
            _submit(engine, answers, args, tokenizer.stop_tokens)
            with Display() if args.json else display_for(prompts, quiet=args.quiet) as display:
                _run(engine, answers, tokenizer, display, meter, times)
        end, work = cache.stats(), _work(model, cache.layout.bytes_per_token)
    if args.quiet:
        return
    num_rows = sum(len(answer.prompt_tokens) + i for answer in answers for i in range(len(answer.tokens)))
    speed = throughput(times.counts(num_rows), work, measure_limits(place.device, place.dtype))
    assert meter.fullest is not None  # there was at least one step
    if args.json:
        print(json.dumps(_document(args, answers, place, engine.attention, load_s, meter, end, speed), indent=2))
    else:
        sys.stdout.flush()
        show(sys.stderr, memory_table(meter.fullest, end), speed_table(speed))


def _prompts(args: argparse.Namespace) -> list[str]:
    """Those of the command line in their order, then those of files; the built-in ones where there are none."""
    if args.system is not None and args.raw:
        raise ConfigError("--system needs the model's chat template, which --raw does without; give one of them")
    if (args.prompts + args.file).count("-") > 1:
        raise ConfigError("- stands for stdin, which can be read once only")
    given = [_read("-") if prompt == "-" else prompt for prompt in args.prompts]
    prompts = [*given, *map(_read, args.file)] or list(_DEMO_PROMPTS)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ConfigError(f"prompt {number} is empty")
        require_text(f"prompt {number}", prompt)
    require_text("--system", args.system or "")
    if args.seed + len(prompts) > 2**63:
        raise ConfigError(f"--seed {args.seed} leaves no seeds below 2**63 for {len(prompts)} prompts")
    return prompts


def _read(name: str) -> str:
    """A file's text, or that of stdin for ``-``, less the newline at its end."""
    where = "stdin" if name == "-" else repr(name)
    if name == "-" and sys.stdin is None:
        raise ConfigError("stdin is closed: there is no prompt to read")
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_LARGEST_PROMPT_BYTES + 1)
        else:
            with Path(name).expanduser().open("rb") as file:
                data = file.read(_LARGEST_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise ConfigError(f"cannot read a prompt from {where}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > _LARGEST_PROMPT_BYTES:
        raise ConfigError(f"the prompt in {where} has more than {_LARGEST_PROMPT_BYTES} bytes")
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt in {where} is not valid UTF-8") from error


def require_text(what: str, text: str) -> None:
    """An argument that is not valid UTF-8 comes with halves of surrogate pairs for its bytes."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{what} is not valid UTF-8")


def require_sampling(args: argparse.Namespace) -> None:
    """Refuse filters of a draw where the most likely token is taken: somebody forgot the temperature."""
    if args.temperature == 0 and (args.top_k > 1 or args.top_p < 1):
        option = f"--top-k {args.top_k}" if args.top_k > 1 else f"--top-p {args.top_p:g}"
        raise ConfigError(
            f"{option} has no effect at temperature 0, which takes the most likely token: leave it out, or give a "
            "temperature, as --temperature 1"
        )


def _encode(tokenizer: Tokenizer, prompt: str, args: argparse.Namespace) -> list[int]:
    if args.raw or not tokenizer.has_chat_template:
        if args.system is not None:
            raise ConfigError("--system needs a chat template, which this model does not have")
        return tokenizer.encode(prompt)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return tokenizer.encode_chat([*system, {"role": "user", "content": prompt}])


def _work(model: Any, bytes_per_token: int) -> ModelWork:
    if hasattr(model, "streamed_weights"):  # transformers'
        num_bytes, num_weights, head = model.streamed_weights()
        return ModelWork(num_bytes, num_weights, head, bytes_per_token)
    weight_bytes, head = model.model.streamed_weight_bytes(), model.model.output_weight.numel()
    return ModelWork(weight_bytes, weight_bytes // model.dtype.itemsize, head, bytes_per_token)


def _submit(engine: Engine, answers: list[_Answer], args: argparse.Namespace, stop_tokens: frozenset[int]) -> None:
    """Queue every prompt; its request id is its index."""
    for index, answer in enumerate(answers):
        sampling = Sampling(args.temperature, args.top_k, args.top_p, seed=args.seed + index)
        request = Request(answer.prompt_tokens, args.max_new_tokens, sampling, stop_tokens)
        try:
            engine.submit(request)
        except ConfigError as error:
            raise ConfigError(f"prompt {index + 1}: {error}") from error


def _run(
    engine: Engine, answers: list[_Answer], tokenizer: Tokenizer, display: Display, meter: Meter, times: StepTimes
) -> None:
    """Step until every answer is complete."""
    streams = [tokenizer.stream() for _ in answers]
    num_tokens = 0
    while engine.has_work:
        start = time.perf_counter()
        news = engine.step()
        times.note(engine.stats(), time.perf_counter() - start)
        meter.observe(engine.cache.stats())
        for new in news:
            if new.token is None:
                raise new.error or RuntimeError(f"prompt {new.request_id + 1} ended with {new.finish_reason}")
            answer, stream = answers[new.request_id], streams[new.request_id]
            num_tokens += 1
            answer.tokens.append(new.token)
            piece = stream.push(new.token)
            if new.finish_reason is not None:
                piece += stream.finish()
            answer.pieces.append(piece)
            display.add(new.request_id, piece)
            if new.finish_reason is not None:
                answer.finish_reason = new.finish_reason
                display.finish(new.request_id)
        if meter.latest is not None:
            display.progress(num_tokens, meter.latest)


def _document(
    args: argparse.Namespace,
    answers: list[_Answer],
    place: Place,
    attention: AttentionBackend,
    load_s: float,
    meter: Meter,
    end: Any,
    speed: dict[str, Any],
) -> dict[str, Any]:
    return {
        "model": args.model,
        "device": str(place.device),
        "dtype": str(place.dtype).removeprefix("torch."),
        "attention": attention.name,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "system": args.system,
        "load_s": load_s,
        "requests": [answer.as_dict() for answer in answers],
        "memory": {"fullest_step": meter.fullest.as_dict() if meter.fullest else None, "end": end.as_dict()},
        "speed": speed,
    }
