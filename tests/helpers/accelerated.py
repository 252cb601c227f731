"""Calls of an accelerated model, and whether it still works."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tests.helpers.hf_models import prompt
from vattn.hf.accelerate import Accelerated

NEW = 8


def generate(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
    args = args or (() if {"inputs", "inputs_embeds"} & options.keys() else (prompt(2),))
    return model.generate(*args, **{"max_new_tokens": NEW, "do_sample": False, **options})


def works(fast: Accelerated, plain: PreTrainedModel) -> None:
    """Captured steps still give the right tokens, and nothing was lost."""
    known = list(fast.reasons)
    assert generate(fast.model).tolist() == generate(plain).tolist()
    assert fast.reasons == known
    assert fast.kv_cache is not None
    fast.kv_cache.check_integrity()
    for slot in [fast.kv_cache.acquire() for _ in range(fast.kv_cache.max_slots - 1)]:  # all but the loop's own
        fast.kv_cache.release(slot)
