"""A decode loop in the middle of its work, for experiments: Llama shapes, settings, and the time of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from vattn import KVCache
from vattn.attention import AttentionBackend, TritonDecodeAttention
from vattn.decode import DecodeLoop, Start
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.ops.ops_table import Ops
from vattn.tuning.table import default_decode, default_ops

STEPS, WARM_UP = 64, 8

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}


def hf_shape(name: str) -> dict[str, object]:
    """Llama-3.1-8B's or Llama-3.2-1B's config."""
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": ROPE,
        **SHAPES[name],
    }


def random_models(shapes: Iterable[str]) -> Iterator[tuple[str, Llama, Ops]]:
    """Each shape's name, a model on the GPU with random bfloat16 weights, which are merged, and its operations."""
    for name in shapes:
        model = Llama.random(LlamaConfig.from_hf(hf_shape(name)), device="cuda", dtype=torch.bfloat16)
        ops = default_ops(model.device, model.dtype)
        FusedLlama(model, 1, ops=ops)  # merges them
        yield name, model, ops


@dataclass(frozen=True)
class Setting:
    """How the loop runs: everything as a user gets it, but for what an ablation changes."""

    ops: Ops
    attention: AttentionBackend | None = None
    graphs: str = "always"
    mapping: str = "thread"
    ahead_tokens: int | None = None
    pdl: bool = True
    steps_ahead: int = 1
    steps_per_launch: int = 1


@contextmanager
def decoding(
    model: Llama, batch: int, length: int, setting: Setting, stagger: int = 0, steps: int = STEPS
) -> Iterator[DecodeLoop]:
    """A loop in the middle of decoding ``batch`` sequences that will have ``length`` rows on average."""
    start = length - (steps + WARM_UP) // 2
    layout = model.kv_layout(length + steps + WARM_UP + 64 + batch * stagger)
    attention = setting.attention or default_decode(layout, model.device, batch, length, model.config.num_heads)
    if not setting.pdl and isinstance(attention, TritonDecodeAttention):
        attention = replace(attention, pdl=False)
    fused = FusedLlama(model, layout.max_seq_len, ops=setting.ops)
    with KVCache(
        layout,
        batch + 1,
        model.device,
        over_read_tokens=attention.over_read_tokens,
        over_read_masked=attention.masks_over_read,
    ) as cache:
        slots = [cache.acquire() for _ in range(batch)]
        cache.ensure_batch(slots, [start + i * stagger for i in range(batch)])
        for slot in slots:
            for layer in range(model.config.num_layers):
                for rows in cache.rows(slot, layer):
                    rows.normal_()
        torch.cuda.synchronize()
        with DecodeLoop(
            fused,
            cache,
            attention=attention,
            buckets=[batch],
            typical_len=length,
            graphs=setting.graphs,
            mapping=setting.mapping,
            ahead_tokens=setting.ahead_tokens,
            steps_ahead=setting.steps_ahead,
            steps_per_launch=setting.steps_per_launch,
        ) as loop:
            loop.start_batch([Start(slot, 5 + slot, steps + WARM_UP + 1) for slot in slots])
            yield loop


def step_ms(loop: DecodeLoop, steps: int = STEPS, per_launch: int = 1) -> list[float]:
    """Milliseconds from each launch's end to the next one's, on the GPU's clock; tokens are read meanwhile."""
    for _ in range(WARM_UP // per_launch):
        loop.step()
    loop.drain()
    events = []
    for _ in range(steps // per_launch):
        loop.step()
        event = torch.cuda.Event(enable_timing=True)
        event.record(loop.stream)
        events.append(event)
    torch.cuda.synchronize()
    return [one.elapsed_time(other) for one, other in pairwise(events)]
