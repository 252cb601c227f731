"""What a user would run instead: transformers with its own caches, and vattn's eager model under torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from vattn import KVCache
from vattn.attention import DecodeBatch, get
from vattn.models import Llama
from vattn.models.llama import rotate


def runs(
    model: Llama, shape: dict[str, Any], batch: int, length: int, steps: int, warm_up: int
) -> dict[str, Callable[[], list[float]]]:
    """System -> what measures it: milliseconds of each decode step."""
    return {
        "transformers-dynamic": lambda: _transformers(shape, batch, length, steps, warm_up, compiled=False),
        "transformers-static-compile": lambda: _transformers(shape, batch, length, steps, warm_up, compiled=True),
        "torch-compile": lambda: _compiled(model, batch, length, steps, warm_up),
    }


@cache
def _hf_model(hidden_size: int, num_layers: int, shape: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {key: value for key, value in shape if key not in ("model_type", "rope_scaling", "rope_theta")}
    rope = dict(dict(shape)["rope_scaling"]) | {"rope_theta": dict(shape)["rope_theta"]}
    config = LlamaConfig(**fields, rope_parameters=rope)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def _transformers(
    shape: dict[str, Any], batch: int, length: int, steps: int, warm_up: int, compiled: bool
) -> list[float]:
    from transformers import DynamicCache, StaticCache

    frozen = tuple((key, tuple(value.items()) if isinstance(value, dict) else value) for key, value in shape.items())
    model = _hf_model(shape["hidden_size"], shape["num_hidden_layers"], frozen)
    # transformers 5.24 calls the argument so; before, it had the other name only.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    steps = steps if compiled else steps // 4
    start = length - (steps + warm_up) // 2
    if compiled:
        past: Any = StaticCache(config=model.config, max_cache_len=length + steps + warm_up)
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    else:
        past, forward = DynamicCache(config=model.config), model.forward
    tokens = torch.randint(0, 1000, (batch, start), device="cuda")
    for begin in range(0, start, 256):
        chunk = tokens[:, begin : begin + 256]
        positions = torch.arange(begin, begin + chunk.shape[1], device="cuda")[None].expand(batch, -1)
        model(chunk, position_ids=positions, **{name: past}, logits_to_keep=1)
    token = tokens[:, :1].clone()
    position = torch.full((batch, 1), start, device="cuda")
    events = []
    for _ in range(warm_up + steps + 1):
        torch.compiler.cudagraph_mark_step_begin()
        logits = forward(token, position_ids=position, **{name: past}).logits
        token = logits[:, -1].argmax(-1, keepdim=True).clone()
        position += 1
        events.append(_event())
    del past
    torch.compiler.reset()
    return _between(events[warm_up:])


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(events: list[torch.cuda.Event]) -> list[float]:
    torch.cuda.synchronize()
    return [one.elapsed_time(other) for one, other in pairwise(events)]


# -- vattn's eager model, compiled ---------------------------------------------------------------------------------
_CONTEXT: dict[str, Any] = {}


# Opaque to the compiler, which would copy views over unmapped memory to make their writes functional.
@torch.library.custom_op("vattn_experiments::append_and_attend", mutates_args=())
def _append_and_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    store, batch = _CONTEXT["cache"], _CONTEXT["batch"]
    where = (_CONTEXT["slots"], batch.rows_int32.long())
    store.k(layer).index_put_(where, k)
    store.v(layer).index_put_(where, v)
    return get("flash-attn-3")(q, store.k(layer), store.v(layer), batch, scale=q.shape[-1] ** -0.5)


@_append_and_attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(q)


@torch.no_grad()
def _compiled(model: Llama, batch: int, length: int, steps: int, warm_up: int) -> list[float]:
    start = length - (steps + warm_up) // 2
    backend = get("flash-attn-3")
    head_dim = model.config.head_dim

    def step(token: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        x = model.embed_tokens(token)
        cos, sin = model.rope(rows)
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            h = layer.input_layernorm(x)
            q, k, v = (
                p(h).unflatten(-1, (-1, head_dim)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = torch.ops.vattn_experiments.append_and_attend(rotate(q, cos, sin), rotate(k, cos, sin), v, index)
            x = x + attention.o_proj(out.flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(model.norm(x), model.output_weight).argmax(-1)

    with KVCache(
        model.kv_layout(length + steps + warm_up + 8), batch, "cuda", over_read_tokens=backend.over_read_tokens
    ) as store:
        slots = [store.acquire() for _ in range(batch)]
        store.ensure_batch(slots, [length + steps + warm_up] * batch)
        index = torch.arange(batch, dtype=torch.int32, device="cuda")
        rows = torch.full((batch,), start, dtype=torch.int32, device="cuda")
        ends = rows + 1
        _CONTEXT.update(cache=store, slots=index.long(), batch=DecodeBatch(index, rows, ends, store.layout.max_seq_len))
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        token, events = torch.zeros(batch, dtype=torch.int64, device="cuda"), []
        try:
            for _ in range(warm_up + steps + 1):
                torch.compiler.cudagraph_mark_step_begin()
                token = compiled(token, rows).clone()
                rows += 1
                ends += 1
                events.append(_event())
            return _between(events[warm_up:])
        finally:
            torch.cuda.synchronize()
            _CONTEXT.clear()
            torch.compiler.reset()
