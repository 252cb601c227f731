"""SmolLM2 on the CPU: the engine and transformers' batched ``generate``, in turn in one process."""

from __future__ import annotations

import time
from typing import Any

import torch
from common import Records

from vattn import Engine, Request
from vattn.cli.speed import measure_limits
from vattn.models import Llama
from vattn.models.loader import find, load_model, load_tokenizer

NEW_TOKENS = 64
QUESTIONS = [
    "Hi!",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List five animals that live in the forest, one per line, with one fact about each of them.",
    "Translate to French: the cat sleeps on the table.",
    "Summarise this: " + "The quick brown fox jumps over the lazy dog while the farmer watches from the barn. " * 12,
    "Continue the story. " + "Once upon a time there was a small village at the edge of a large forest. " * 30,
]


def run(records: Records, quick: bool) -> None:
    path = find("smollm2")
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    new_tokens, repeats = (4, 1) if quick else (NEW_TOKENS, 3)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        case = f"SmolLM2 prompts={len(prompts)} new={new_tokens} dtype={name} threads={torch.get_num_threads()}"
        model = load_model(path, dtype=dtype)
        hf_model = _hf_model(path, dtype)
        with Engine(model, max_batch=len(prompts), memory_limit=1 << 29, prefix_caching=False) as engine:
            systems = {
                "vattn": lambda engine=engine: _vattn(engine, prompts, new_tokens),
                "transformers": lambda hf_model=hf_model: _transformers(hf_model, prompts, new_tokens),
            }
            samples: dict[str, list[float]] = {system: [] for system in systems}
            answers, order, drawn, limits = {}, list(systems), records.drawn(case), []
            for _ in range(repeats + 1):  # the first one warms up
                limits.append(_limit(model, prompts, new_tokens))
                for system in drawn.sample(order, len(order)):
                    begin = time.perf_counter()
                    answers[system] = systems[system]()
                    samples[system].append(len(prompts) * new_tokens / (time.perf_counter() - begin))
        same = sum(one == other for one, other in zip(answers["vattn"], answers["transformers"], strict=True))
        print(f"{case}: {same} of {len(prompts)} answers are the same")
        assert dtype != torch.float32 or same == len(prompts), "the two systems do not compute the same"
        records.add(case, "limit", "tokens_per_s", "tokens/s", [max(limits)])  # whatever else ran then took some
        for system, found in samples.items():
            records.add(case, system, "tokens_per_s", "tokens/s", found[1:])
        del model, hf_model


def _vattn(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    done = engine.generate([Request(prompt, max_new_tokens=new_tokens) for prompt in prompts])
    return [list(each.tokens) for each in done]


def _hf_model(path: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=plain, dtype=dtype
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def _transformers(hf_model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """One batch, padded on the left; greedy, and no token ends it."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = hf_model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, longest:].tolist()


def _limit(model: Llama, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens/s if each step read weights, K and V once, and nothing else took any time, the prompts neither."""
    kv_bytes = model.kv_layout().bytes_per_token
    rows = sum(len(prompt) + new_tokens / 2 for prompt in prompts)
    per_step = model.streamed_weight_bytes() + rows * kv_bytes
    return len(prompts) * measure_limits(model.device, model.dtype).read_bytes_per_s / per_step
