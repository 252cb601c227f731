"""Small models of many architectures with random weights, and the ways to generate that a cache has to get right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from helpers.hf_families import MODELS, MORE, VOCABULARY
from vattn.hf import VirtualCache

# What the installed transformers calls the argument, and the attribute of what a model returns.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"

NEW_TOKENS, MAX_LENGTH = 40, 160
PROMPT_LENGTH = 11


def with_cache(past: Any) -> dict[str, Any]:
    """The argument that hands a cache to a model or to ``generate``."""
    return {CACHE: past}


def make_model(name: str, seed: int = 2, **changes: Any) -> PreTrainedModel:
    """Random weights, float32, evaluation mode; never ends a text early."""
    kind, arguments = {**MODELS, **MORE}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**arguments, **changes})
    for key in ("bos_token_id", "eos_token_id"):  # some configs insist on their own
        setattr(config, key, None)
    auto = transformers.AutoModelForCausalLM
    # Older versions run Gemma 2 on sdpa without its soft-capping, which vattn honours.
    model = auto.from_config(config, attn_implementation="eager" if name == "Gemma 2" else None).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # what an architecture initialises to a constant
            if parameter.ndim > 1 and parameter.std() < 0.05:
                parameter.add_(torch.randn_like(parameter) * 0.25)
            elif name.endswith("norm.weight"):
                parameter.mul_(1 + torch.randn_like(parameter)).add_(torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(rows: int, seed: int = 1, length: int = PROMPT_LENGTH) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


Generate = Callable[..., torch.Tensor]


def _dense(generate: Generate) -> torch.Tensor:
    return generate(prompt(3), do_sample=False)


def _left_padded(generate: Generate) -> torch.Tensor:
    mask = torch.ones(3, PROMPT_LENGTH, dtype=torch.long)
    mask[0, :7], mask[2, :2] = 0, 0
    return generate(prompt(3) * mask, attention_mask=mask, do_sample=False)


def _beams(generate: Generate) -> torch.Tensor:
    return generate(prompt(2), do_sample=False, num_beams=3)


def _sampling(generate: Generate) -> torch.Tensor:
    torch.manual_seed(5)
    return generate(prompt(3), do_sample=True, temperature=1.2, top_k=20)


def _prompt_lookup(generate: Generate) -> torch.Tensor:
    return generate(prompt(1, length=6).repeat(1, 4), do_sample=False, prompt_lookup_num_tokens=4)


def _multi_turn(generate: Generate) -> torch.Tensor:
    said = generate(prompt(2), do_sample=False, max_new_tokens=NEW_TOKENS // 2)
    return generate(torch.cat([said, prompt(2, seed=9)], dim=1), do_sample=False, max_new_tokens=NEW_TOKENS // 2)


def _chunked(generate: Generate) -> torch.Tensor:
    return generate(prompt(2, length=30), do_sample=False, prefill_chunk_size=7)


def _beam_sampling(generate: Generate) -> torch.Tensor:
    torch.manual_seed(6)
    return generate(prompt(2), do_sample=True, num_beams=3, num_return_sequences=2)


def _parallel_samples(generate: Generate) -> torch.Tensor:
    torch.manual_seed(7)
    return generate(prompt(1), do_sample=True, top_p=0.9, num_return_sequences=4)


def _one_row(generate: Generate) -> torch.Tensor:
    return generate(prompt(1, seed=3, length=40), do_sample=False, repetition_penalty=1.3)


MODES: dict[str, Callable[[Generate], torch.Tensor]] = {
    "dense": _dense,
    "left-padded": _left_padded,
    "beam 3": _beams,
    "sampling": _sampling,
    "prompt lookup": _prompt_lookup,
    "multi-turn": _multi_turn,
    "prompt in chunks": _chunked,
    "beam sampling": _beam_sampling,
    "4 samples": _parallel_samples,
    "long prompt": _one_row,
}


def run(model: PreTrainedModel, mode: str, cache: Any) -> torch.Tensor:
    """The mode's tokens, prompt included; every call of ``generate`` goes on with the same cache."""

    def generate(tokens: torch.Tensor, max_new_tokens: int = NEW_TOKENS, **options: Any) -> torch.Tensor:
        return model.generate(tokens, max_new_tokens=max_new_tokens, **with_cache(cache), **options)

    return MODES[mode](generate)


@contextmanager
def checked_cache(model: PreTrainedModel) -> Iterator[VirtualCache]:
    """A cache of small pages, whose books are held against its pages at the end."""
    with VirtualCache(model.config, max_length=MAX_LENGTH, page_bytes=4096) as past:
        yield past
        if past.kv_cache:
            past.kv_cache.check_integrity()


def logits(model: PreTrainedModel, tokens: torch.Tensor, past: Any = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **with_cache(past), **options).logits


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


# -- what holds and what is refused -----------------------------------------------------------------------------------
# Of these, every way to generate is tried in any run of the tests; of the others, where slow tests are run.
ALWAYS = {
    "Llama",
    "Mistral, window 16",
    "Gemma 2",
    "Gemma 3",
    "GPT-OSS",
    "GPT-2",
    "Falcon",
    "DeepSeek-V3",
    "Qwen3-Next",
}
# (model, mode) -> why; the default cache refuses these too.
REFUSED = {("Qwen3-Next", "prompt lookup"): "transformers does not assist models with recurrent layers"}
# Models that do not take their attention from transformers' registry: they compute their own over views.
OWN_ATTENTION = {"Falcon", "Falcon, ALiBi", "MPT"}
# Models that came to that registry between the oldest and the newest transformers that vattn supports.
MOVED = {"GPT-J"}
# Models that change K or V between cache and attention: what they ask for is passed on.
PASSED_ON = {"DiffLlama", "DeepSeek-V3"}


def table() -> str:
    """The table in the docs, one row a model."""
    notes = {reason: number for number, reason in enumerate(dict.fromkeys(REFUSED.values()), 1)}
    lines = [
        "| model | attention | " + " | ".join(MODES) + " |",
        "| --- | --- |" + " --- |" * len(MODES),
    ]
    for model in MODELS:
        cells = [f"refused [{notes[REFUSED[model, mode]]}]" if (model, mode) in REFUSED else "same" for mode in MODES]
        computes = "its own" if model in OWN_ATTENTION | PASSED_ON else "vattn"
        lines.append(f"| {model} | {computes} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"[{number}] {reason}." for reason, number in notes.items())])


if __name__ == "__main__":
    print(table())
