"""What runs fastest on this GPU: tables of measurements, shipped for some and made by ``vattn tune`` for others.

A table says for each product of a decode step, by its shape and number of tokens, which kernel to use, and for each
shape of attention, by batch and context (a decode step) or by new and all tokens (a prefill), which backend. What was
not measured falls back to cuBLAS and to the orders of ``vattn.attention``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..attention import AttentionBackend, PhasedAttention, TritonDecodeAttention, choose, choose_decode, get
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..layout import KVLayout
from ..ops.ops_table import LinearTable, Ops, fused_ops, reference_ops
from ..ops.skinny_linear import LinearConfig
from ..ops.triton_support import unavailable

__all__ = [
    "TuningTable",
    "decode_attention",
    "default_attention",
    "default_decode",
    "default_ops",
    "dtype_name",
    "measured_attention",
    "table_for",
    "table_paths",
]

_SHIPPED = Path(__file__).parent / "tuned"


@dataclass
class TuningTable:
    """Measurements of one GPU.

    Attributes:
        gpu: its name.
        linear: records with outputs, inputs, dtype, tokens, swiglu, config (None: cuBLAS), us, cublas_us.
        attention: records with num_heads, num_kv_heads, head_dim, dtype, batch, context, backend, options, us.
        prefill: records with num_heads, num_kv_heads, head_dim, dtype, new, total, us (of each backend).
        pdl: whether kernels take programmatic dependent launch: what GPUs of capability 9.0 and newer have.
        made: date and torch version, by the room that measured.
    """

    gpu: str
    linear: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    prefill: list[dict[str, Any]] = field(default_factory=list)
    pdl: bool = False
    made: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> TuningTable:
        """From a file.

        Raises:
            ConfigError: it is not a table.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} is no tuning table ({error}): delete it, or run vattn tune again") from error

    def write(self, path: Path) -> None:
        """To a file, one record a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = {
            name: "[\n" + ",\n".join("  " + json.dumps(record) for record in getattr(self, name)) + "\n ]"
            for name in ("linear", "attention", "prefill")
        }
        path.write_text(
            "{\n"
            f' "gpu": {json.dumps(self.gpu)},\n "pdl": {json.dumps(self.pdl)},\n "made": {json.dumps(self.made)},\n'
            f' "linear": {lists["linear"]},\n "attention": {lists["attention"]},\n "prefill": {lists["prefill"]}\n}}\n'
        )

    def add_linear(self, records: Iterable[dict[str, Any]]) -> None:
        """Take records over, in place of earlier ones for the same products."""
        new = list(records)
        keys = {_linear_key(record) for record in new}
        self.linear = [record for record in self.linear if _linear_key(record) not in keys] + new
        self.made["linear"] = f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}"

    def add_attention(self, records: Iterable[dict[str, Any]]) -> None:
        """Take records over, in place of earlier ones for the same cases."""
        new = list(records)
        keys = {_attention_key(record) for record in new}
        self.attention = [record for record in self.attention if _attention_key(record) not in keys] + new
        self.made["attention"] = f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}"

    def add_prefill(self, records: Iterable[dict[str, Any]]) -> None:
        """Take records over, in place of earlier ones for the same cases."""
        new = list(records)
        keys = {_prefill_key(record) for record in new}
        self.prefill = [record for record in self.prefill if _prefill_key(record) not in keys] + new
        self.made["prefill"] = f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}"

    def linear_table(self, dtype: torch.dtype) -> LinearTable:
        """What ``Ops.linear`` looks products up in."""
        entries: dict[tuple[int, int, bool], dict[int, LinearConfig | None]] = {}
        for record in self.linear:
            if record["dtype"] == dtype_name(dtype):
                config = None if record["config"] is None else LinearConfig(**record["config"])
                shape = (record["outputs"], record["inputs"], record["swiglu"])
                entries.setdefault(shape, {})[record["tokens"]] = config
        return LinearTable(entries, self.pdl)


def _linear_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("outputs", "inputs", "dtype", "tokens", "swiglu"))


def _attention_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("num_heads", "num_kv_heads", "head_dim", "dtype", "batch", "context"))


def _prefill_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("num_heads", "num_kv_heads", "head_dim", "dtype", "new", "total"))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table_paths(gpu: str) -> tuple[Path, Path]:
    """Where the table of a GPU lies: the user's own, then the one that vattn brings."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", gpu) + ".json"
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vattn" / "tuned"
    return own / name, _SHIPPED / name


@cache
def _read_for(gpu: str) -> TuningTable:
    for path in table_paths(gpu):
        if path.exists():
            return TuningTable.read(path)
    return TuningTable(gpu)


def table_for(device: torch.device) -> TuningTable:
    """The table of a device's GPU: the user's own, else the shipped one, else an empty one."""
    return _read_for(torch.cuda.get_device_name(device)) if device.type == "cuda" else TuningTable("none")


def default_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """Fused operations and the measured products on a GPU that has Triton, else the eager references."""
    if device.type != "cuda" or unavailable() is not None:
        return reference_ops()
    return fused_ops(table_for(device).linear_table(dtype))


def measured_attention(
    table: TuningTable, num_heads: int, layout: KVLayout, batch: int, context: int
) -> AttentionBackend | None:
    """The fastest backend for captured decode steps of about that batch and context; None where none was measured.

    The nearest measured case is taken, by the ratios of batch and of context, multiplied.
    """
    group = layout.groups[0]
    shape = (num_heads, group.num_kv_heads, group.head_dim, dtype_name(layout.dtype))
    found = [
        record
        for record in table.attention
        if (record["num_heads"], record["num_kv_heads"], record["head_dim"], record["dtype"]) == shape
    ]
    if not found or any(
        other.head_dim != group.head_dim or other.v_head_dim != group.head_dim for other in layout.groups
    ):
        return None

    def distance(record: dict[str, Any]) -> float:
        return abs(math.log(record["batch"] / batch)) + abs(math.log(record["context"] / context))

    record = min(found, key=distance)
    if record["backend"] == TritonDecodeAttention.name:
        return TritonDecodeAttention(**record["options"], pdl=table.pdl)
    return get(record["backend"])


def default_attention(
    layout: KVLayout,
    device: torch.device,
    num_heads: int,
    *,
    max_over_read: int | None = None,
    new: int = 2048,
    total: int | None = None,
) -> AttentionBackend:
    """What a model is run with: prefill by the backend measured as fastest there, decode steps outside graphs as
    ``vattn.attention.choose`` has them.

    Args:
        layout: of the cache, K and V of one head_dim.
        max_over_read: as for ``choose``.
        new, total: tokens that a typical pass of prefill computes, and all of the sequence's then (None: the same); the
            nearest measured case is taken.

    Raises:
        ConfigError: none runs there.
    """
    group = layout.groups[0]
    chosen = choose(device, layout.dtype, group.head_dim, max_over_read=max_over_read)
    shape = (num_heads, group.num_kv_heads, group.head_dim, dtype_name(layout.dtype))
    found = [record for record in table_for(device).prefill if _prefill_key(record)[:4] == shape]
    if not found:
        return chosen

    def distance(record: dict[str, Any]) -> float:
        return abs(math.log(record["new"] / new)) + abs(math.log(record["total"] / (total or new)))

    nearest = min(found, key=distance)
    usable = [
        name
        for name in nearest["us"]
        if get(name).supports(device, layout.dtype, group.head_dim) is None
        and (max_over_read is None or get(name).over_read_tokens <= max_over_read)
    ]
    if not usable:
        return chosen
    prefill = get(min(usable, key=nearest["us"].__getitem__))
    decode = chosen.decode if isinstance(chosen, PhasedAttention) else chosen
    return prefill if prefill.name == decode.name else PhasedAttention(prefill, decode)


def default_decode(
    layout: KVLayout, device: torch.device, batch: int, context: int, num_heads: int
) -> AttentionBackend:
    """The measured backend for a decode loop, else the first of those that can be captured; for opening a cache with.

    Raises:
        ConfigError: none runs on that device.
    """
    found = measured_attention(table_for(device), num_heads, layout, batch, context)
    if found is not None and found.supports(device, layout.dtype, layout.groups[0].head_dim) is None:
        return found
    return choose_decode(layout, device)


def decode_attention(cache: KVCache, num_heads: int, batch: int, context: int) -> AttentionBackend:
    """The measured backend for decode steps over a cache, if the cache has the margin that it needs, else another.

    Raises:
        ConfigError: none runs there.
    """
    margin = 0 if cache.over_read_masked else cache.over_read_tokens
    found = measured_attention(table_for(cache.device), num_heads, cache.layout, batch, context)
    if (
        found is not None
        and found.over_read_tokens <= margin
        and found.supports(cache.device, cache.layout.dtype, cache.layout.groups[0].head_dim) is None
    ):
        return found
    return choose_decode(cache.layout, cache.device, max_over_read=margin)
