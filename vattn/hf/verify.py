"""Whether a model computes in passes over a cache what it computes by itself: tried once, with a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..attention import AttentionBatch, DecodeBatch, bind
from ..engine.opening import attention_for_prompts, opened_cache
from ..errors import ConfigError
from ..graphs.capture import captured
from ..tuning import default_decode

if TYPE_CHECKING:
    from .model import TransformersModel

__all__ = ["own_logits", "verify"]

# Two texts that share a pass; of each, all tokens but the last are a prompt, and the last is decoded.
_LENGTHS = (5, 3)
# Largest error of logits, of their size. In half precision the order of sums alone makes a few hundredths (0.044 is the
# most of 60 models on an H100, 2026-11-27), and each token that a router sends to another expert more; there the text
# with the smaller error counts.
_TOLERANCE, _HALF_TOLERANCE = 0.01, 0.15


def _texts(vocab_size: int) -> list[list[int]]:
    return [[(7 * i + 3 + j) % vocab_size for i in range(length)] for j, length in enumerate(_LENGTHS)]


def own_logits(model: PreTrainedModel, vocab_size: int) -> torch.Tensor:
    """``[texts, vocab_size]``: of each text's last token, by the model alone."""
    rows = [
        model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits[0, -1]
        for text in _texts(vocab_size)
    ]
    return torch.stack(rows)


def verify(model: TransformersModel, wanted: torch.Tensor) -> None:
    """Compute the same in a pass of prompts and a step.

    Args:
        wanted: ``own_logits``.

    Raises:
        ConfigError: they are others.
    """
    texts, device = _texts(model.config.vocab_size), model.device
    with opened_cache(model, None, len(texts), None) as cache:
        slots = [cache.acquire() for _ in texts]
        lengths = [len(text) for text in texts]
        cache.ensure_batch(slots, lengths)
        prompts = [length - 1 for length in lengths]
        margin = 0 if cache.over_read_masked else cache.over_read_tokens
        case = (cache.layout, device, len(texts), max(lengths), model.num_heads)
        decode = bind(default_decode(*case, max_over_read=margin, features=model.attention_features))
        rows, listed = (torch.tensor(each, dtype=torch.int32, device=device) for each in (prompts, slots))
        last = torch.tensor([text[-1] for text in texts], dtype=torch.int32, device=device)
        with cache.step(slots):
            model.prefill(
                torch.tensor([token for text in texts for token in text[:-1]], device=device),
                AttentionBatch.build(slots, prompts, prompts, device),
                cache,
                attention_for_prompts(model, cache, sum(prompts)),
            )
            batch = DecodeBatch(listed, rows, rows + 1, max(lengths), last)
            found = model.decode(model.embedding[last], batch, cache, decode)
            if device.type == "cuda":
                _require_capturable(model, lambda: model.decode(model.embedding[last], batch, cache, decode))
        errors = (found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
        half = model.dtype in (torch.float16, torch.bfloat16)
        error = float(errors.min() if half else errors.max())
    if not error <= (_HALF_TOLERANCE if half else _TOLERANCE):
        raise ConfigError(
            f"vattn cannot run {type(model.model).__name__}: its logits over a cache are off by {error:.3g} of their "
            "size, so its layers need more than each token's K and V, or compute a token by others of the same pass, "
            "as quantised activations do; use vattn.hf.VirtualCache with its generate()"
        )


def _require_capturable(model: TransformersModel, step: Callable[[], object]) -> None:
    """ConfigError unless a CUDA graph can be made of a step, which has run once."""
    stream = torch.cuda.Stream(model.device)
    stream.wait_stream(torch.cuda.current_stream(model.device))
    try:
        with torch.cuda.stream(stream):
            captured(step)
    except Exception as error:
        raise ConfigError(
            f"a CUDA graph cannot capture {type(model.model).__name__}: {error}; a layer waits for the GPU or reads on "
            "the host, as those of some quantised weights do: load other weights, or use vattn.hf.VirtualCache with "
            "its generate()"
        ) from error
