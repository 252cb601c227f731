"""``vattn generate``: prompts in, text out, and what it cost in pages."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from .arguments import require_int
from .attention import AttentionBackend, get
from .cli import parse_bytes
from .cli_display import Display, LineDisplay, LiveDisplay, NoDisplay
from .cli_report import Meter, memory_table, read_bandwidth, speed_table, throughput
from .cli_threads import use_all_cores
from .driver import open_driver
from .engine import Engine, Request
from .errors import ConfigError
from .kv_cache import KVCache
from .models import Llama
from .requests import Sampling, checked_sampling
from .tuning import default_attention

__all__ = ["generate"]

_MAX_BATCH = 64

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
    text: str = ""
    finish_reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "text": self.text,
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
    prompts = args.prompts or list(_DEMO_PROMPTS)
    memory_limit = _check(args, prompts)
    device = _device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        use_all_cores()

    from vattn.models.loader import find, load_model, load_tokenizer

    start = time.perf_counter()
    path = find(args.model)
    model = load_model(path, device, dtype)
    tokenizer = load_tokenizer(path)
    load_s = time.perf_counter() - start

    chat = tokenizer.has_chat_template and not args.raw
    answers = [
        _Answer(
            prompt, tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
        )
        for prompt in prompts
    ]
    max_slots = min(len(prompts), args.max_batch or _MAX_BATCH)
    attention = _attention(args.attention, model, device, dtype)
    meter = Meter()
    with KVCache(
        model.kv_layout(),
        max_slots,
        device,
        memory_limit,
        over_read_tokens=attention.over_read_tokens,
        over_read_masked=attention.masks_over_read,
    ) as cache:
        engine = Engine(model, cache, attention, on_step=lambda: meter.observe(cache.stats()))
        _submit(engine, answers, args, tokenizer.stop_tokens)
        with _display(args.json, prompts) as display:
            _run(engine, answers, tokenizer, display, meter)
        end = cache.stats()
        bytes_per_token = cache.layout.bytes_per_token
    speed = throughput(engine.stats, model.streamed_weight_bytes(), bytes_per_token, read_bandwidth(device))
    assert meter.fullest is not None  # there was at least one step
    if args.json:
        print(json.dumps(_document(args, answers, device, dtype, attention, load_s, meter, end, speed), indent=2))
    else:
        console = Console(highlight=False)
        console.print(memory_table(meter.fullest, end), speed_table(speed))


def _check(args: argparse.Namespace, prompts: list[str]) -> int | None:
    """Everything that can be refused before the model is loaded; returns the memory limit in bytes."""
    require_int("--max-new-tokens", args.max_new_tokens, 1)
    for seed in (args.seed, args.seed + len(prompts) - 1):
        checked_sampling(Sampling(args.temperature, 0, args.top_p, seed))
    if args.max_batch is not None:
        require_int("--max-batch", args.max_batch, 1)
    if args.attention is not None:
        get(args.attention)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ConfigError(f"prompt {number} is empty")
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ConfigError(f"prompt {number} is not valid UTF-8")
    if not args.model:
        raise ConfigError("--model is empty; expected smollm2, a folder or a .gguf file")
    return None if args.memory_limit is None else parse_bytes(args.memory_limit)


def _device(name: str | None) -> torch.device:
    """The device asked for, or the best there is; ConfigError when it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    driver = open_driver(name)
    try:
        return driver.device
    finally:
        driver.close()


def _attention(name: str | None, model: Llama, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend asked for, or the best there is; ConfigError when it cannot run there."""
    if name is None:
        return default_attention(model.kv_layout(1), device, model.config.num_heads)
    backend = get(name)
    if reason := backend.supports(device, dtype, model.config.head_dim):
        raise ConfigError(f"attention {name!r} cannot be used here: {reason}")
    return backend


def _submit(engine: Engine, answers: list[_Answer], args: argparse.Namespace, stop_tokens: frozenset[int]) -> None:
    """Queue every prompt; its request id is its index."""
    for index, answer in enumerate(answers):
        request = Request(
            answer.prompt_tokens, args.max_new_tokens, args.temperature, args.top_p, args.seed + index, stop_tokens
        )
        try:
            engine.submit(request)
        except ConfigError as error:
            raise ConfigError(f"prompt {index + 1}: {error}") from error


def _display(quiet: bool, prompts: list[str]) -> Display:
    console = Console(highlight=False)
    if quiet:
        return NoDisplay()
    return LiveDisplay(console, prompts) if console.is_terminal else LineDisplay(prompts)


def _run(engine: Engine, answers: list[_Answer], tokenizer: Any, display: Display, meter: Meter) -> None:
    """Step until every answer is complete."""
    streams = [tokenizer.stream() for _ in answers]
    num_tokens = 0
    try:
        while engine.has_work:
            for new in engine.step():
                answer, stream = answers[new.request_id], streams[new.request_id]
                num_tokens += 1
                answer.tokens.append(new.token)
                piece = stream.push(new.token)
                if new.finish_reason is not None:
                    piece += stream.finish()
                answer.text += piece
                display.add(new.request_id, piece)
                if new.finish_reason is not None:
                    answer.finish_reason = new.finish_reason
                    display.finish(new.request_id)
            if meter.latest is not None:
                display.progress(num_tokens, meter.latest)
    finally:
        engine.abort()  # nothing to do unless something was raised between steps


def _document(
    args: argparse.Namespace,
    answers: list[_Answer],
    device: torch.device,
    dtype: torch.dtype,
    attention: AttentionBackend,
    load_s: float,
    meter: Meter,
    end: Any,
    speed: dict[str, Any],
) -> dict[str, Any]:
    return {
        "model": args.model,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention.name,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "load_s": load_s,
        "requests": [answer.as_dict() for answer in answers],
        "memory": {"fullest_step": meter.fullest.as_dict() if meter.fullest else None, "end": end.as_dict()},
        "speed": speed,
    }
