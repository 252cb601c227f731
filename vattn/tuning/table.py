"""What runs fastest on this GPU: tables of measurements, shipped for some and made by ``vattn tune`` for others.

A table says for each product of a decode step, by its shape and number of tokens, which kernel to use, and for each
shape of attention, by batch and context (a decode step) or by new and all tokens (a prefill), which backend. What was
not measured falls back to cuBLAS and to the orders in ``vattn.attention.choice``. A GPU without a table of its own
takes a shipped one of the same compute capability, that with the likest name: most of an H100's fast kernels are fast
on others of its kind, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..attention import AttentionBackend, Needs, choose_phases, get, pick
from ..errors import ConfigError
from ..layout import KVLayout
from ..machine import user_folder
from ..ops.ops_table import LinearTable, Ops, fused_ops, reference_ops
from ..ops.skinny_linear import LinearConfig
from ..ops.triton_support import unavailable

__all__ = [
    "TuningTable",
    "default_attention",
    "default_decode",
    "default_ops",
    "dtype_name",
    "file_name",
    "own_folder",
    "table_for",
    "table_paths",
    "table_to_add_to",
]

_SHIPPED = Path(__file__).parent / "tuned"

_HEADS = ("num_heads", "num_kv_heads", "head_dim", "dtype")
_CASES = {  # what tells a case from others, by the kind of record
    "linear": ("outputs", "inputs", "dtype", "tokens", "swiglu"),
    "attention": (*_HEADS, "batch", "context"),
    "prefill": (*_HEADS, "new", "total"),
}


@dataclass
class TuningTable:
    """Measurements of one GPU.

    Attributes:
        gpu: its name.
        capability: its compute capability, such as ``(9, 0)``; None where it is not known.
        based_on: another GPU, whose measurements stand in for what was not measured on this one.
        linear: records with outputs, inputs, dtype, tokens, swiglu, config (None: cuBLAS), us, cublas_us.
        attention: records with num_heads, num_kv_heads, head_dim, dtype, batch, context, backend, options, us.
        prefill: records with num_heads, num_kv_heads, head_dim, dtype, new, total, us (of each backend).
        pdl: whether kernels take programmatic dependent launch: what GPUs of capability 9.0 and newer have.
        made: date and torch version of the newest records, by their kind.
    """

    gpu: str
    linear: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    prefill: list[dict[str, Any]] = field(default_factory=list)
    pdl: bool = False
    made: dict[str, str] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    based_on: str | None = None

    @classmethod
    def read(cls, path: Path) -> TuningTable:
        """From a file.

        Raises:
            ConfigError: it is not a table.
        """
        try:
            found = cls(**json.loads(path.read_text()))
            found.capability = None if found.capability is None else (found.capability[0], found.capability[1])
            for kind in _CASES:
                for record in getattr(found, kind):
                    _case(kind, record)
            return found
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise ConfigError(f"{path} is no tuning table ({error!r}): delete it, or run vattn tune again") from error

    def write(self, path: Path) -> None:
        """To a file, one record a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = {
            name: "[\n" + ",\n".join("  " + json.dumps(record) for record in getattr(self, name)) + "\n ]"
            for name in _CASES
        }
        head = {name: getattr(self, name) for name in ("gpu", "capability", "based_on", "pdl", "made")}
        facts = "".join(f' "{name}": {json.dumps(value)},\n' for name, value in head.items())
        path.write_text("{\n" + facts + ",\n".join(f' "{name}": {text}' for name, text in lists.items()) + "\n}\n")

    def add(self, kind: str, records: Iterable[dict[str, Any]]) -> None:
        """Take records over, in place of earlier ones for the same cases.

        Args:
            kind: ``"linear"``, ``"attention"`` or ``"prefill"``.
        """
        new = list(records)
        cases = {_case(kind, record) for record in new}
        kept = [record for record in getattr(self, kind) if _case(kind, record) not in cases]
        setattr(self, kind, kept + new)
        self.made[kind] = f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}"

    def linear_table(self, dtype: torch.dtype) -> LinearTable:
        """What ``Ops.linear`` looks products up in."""
        entries: dict[tuple[int, int, bool], dict[int, LinearConfig | None]] = {}
        for record in self.linear:
            if record["dtype"] == dtype_name(dtype):
                config = None if record["config"] is None else LinearConfig(**record["config"])
                shape = (record["outputs"], record["inputs"], record["swiglu"])
                entries.setdefault(shape, {})[record["tokens"]] = config
        return LinearTable(entries, self.pdl)

    def decode_backends(self, num_heads: int, layout: KVLayout, batch: int, context: int) -> list[AttentionBackend]:
        """The fastest backend for captured decode steps of about that batch and context; empty where none was measured.

        The nearest measured case is taken, by the ratios of batch and of context, multiplied.
        """
        record = _nearest(self.attention, num_heads, layout, batch=batch, context=context)
        if record is None:
            return []
        return [get(record["backend"]).tuned(record["options"], pdl=self.pdl)]

    def prefill_backends(self, num_heads: int, layout: KVLayout, new: int, total: int) -> list[AttentionBackend]:
        """All that were measured in the nearest case of that many new tokens of ``total``, fastest first."""
        record = _nearest(self.prefill, num_heads, layout, new=new, total=total)
        return [] if record is None else [get(name) for name in sorted(record["us"], key=record["us"].__getitem__)]


def _nearest(records: list[dict[str, Any]], num_heads: int, layout: KVLayout, **case: int) -> dict[str, Any] | None:
    """The record of these heads whose ``case`` is nearest; None where heads of this shape were not measured."""
    group = layout.groups[0]
    if any({other.head_dim, other.v_head_dim} != {group.head_dim} for other in layout.groups):
        return None
    shape = (num_heads, group.num_kv_heads, group.head_dim, dtype_name(layout.dtype))
    found = [record for record in records if tuple(record[key] for key in _HEADS) == shape]
    return min(found, key=lambda record: sum(abs(math.log(record[key] / case[key])) for key in case), default=None)


def _case(kind: str, record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in _CASES[kind])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table_paths(gpu: str) -> tuple[Path, Path]:
    """Where the table of a GPU lies: the user's own, then the one that vattn brings."""
    name = f"{file_name(gpu)}.json"
    return own_folder() / name, _SHIPPED / name


def own_folder() -> Path:
    """Where the user's own measurements are kept."""
    return user_folder("tuned")


def file_name(gpu: str) -> str:
    """What a file about a GPU is called, without the ending."""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu)


@cache
def _read_for(gpu: str, capability: tuple[int, int]) -> TuningTable:
    own, shipped = table_paths(gpu)
    found = TuningTable.read(shipped) if shipped.exists() else _shipped_for(gpu, capability)
    if found is None:
        found = TuningTable(gpu, capability=capability)
    if own.exists():
        measured = TuningTable.read(own)
        made = {**found.made, **measured.made}
        for kind in _CASES:
            found.add(kind, getattr(measured, kind))
        found.made, found.pdl = made, measured.pdl
        found.based_on = measured.based_on or (None if found.gpu == gpu else found.gpu)
        found.gpu, found.capability = gpu, capability
    return found


def _shipped_for(gpu: str, capability: tuple[int, int]) -> TuningTable | None:
    tables = [TuningTable.read(path) for path in sorted(_SHIPPED.glob("*.json"))]
    fitting = [table for table in tables if table.capability == capability]
    words = set(gpu.split())
    return max(fitting, key=lambda table: len(words.intersection(table.gpu.split())), default=None)


def table_for(device: torch.device) -> TuningTable:
    """What is known of a device's GPU: the user's own measurements, else those of a shipped table, of that GPU or of
    another of its compute capability.

    Raises:
        ConfigError: the user's table is none.
    """
    if device.type != "cuda":
        return TuningTable("none")
    return _read_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def table_to_add_to(device: torch.device) -> TuningTable:
    """A copy of ``table_for``, as this GPU's own; what it has of another GPU stays until it is measured here."""
    found, gpu = deepcopy(table_for(device)), torch.cuda.get_device_name(device)
    if found.gpu != gpu:
        found.based_on = found.gpu
    found.gpu, found.capability = gpu, torch.cuda.get_device_capability(device)
    # What a kernel of compute capability 9.0 or newer can do, and measured to pay on an H100.
    found.pdl = found.capability >= (9, 0)
    return found


def default_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """Fused operations and the measured products on a GPU that has Triton, else the eager references."""
    if device.type != "cuda" or unavailable() is not None:
        return reference_ops()
    return fused_ops(table_for(device).linear_table(dtype))


def default_attention(
    layout: KVLayout,
    device: torch.device,
    num_heads: int,
    *,
    max_over_read: int | None = None,
    new: int = 2048,
    total: int | None = None,
    name: str | None = None,
    features: frozenset[str] = frozenset(),
) -> AttentionBackend:
    """What a model is run with: prefill by the backend measured as fastest there, decode steps outside graphs as
    ``vattn.attention.choose`` has them.

    Args:
        layout: of the cache.
        max_over_read, name, features: as for ``choose``.
        new, total: tokens that a typical pass of prefill computes, and all of the sequence's then (None: the same); the
            nearest measured case is taken.

    Raises:
        ConfigError: none runs there, or not the one that was named.
    """
    measured = table_for(device).prefill_backends(num_heads, layout, new, total or new)
    return choose_phases(Needs.of(layout, device, max_over_read=max_over_read, features=features), measured, name)


def default_decode(
    layout: KVLayout,
    device: torch.device,
    batch: int,
    context: int,
    num_heads: int,
    *,
    max_over_read: int | None = None,
    features: frozenset[str] = frozenset(),
) -> AttentionBackend:
    """What a decode loop takes: the measured backend, else the first that can be captured in a graph.

    Args:
        layout: of the cache.
        batch, context: sequences of a step, and rows that each typically has.
        max_over_read: rows past the end of a sequence that may be read; None where the cache is opened with the margin
            of what is chosen.
        features: as for ``choose``.

    Raises:
        ConfigError: none runs there.
    """
    captured = device.type == "cuda"  # elsewhere there are no graphs
    others = {"max_over_read": max_over_read, "features": features}
    needs = Needs.of(layout, device, decode=True, captured=captured, **others)
    return pick(needs, table_for(device).decode_backends(num_heads, layout, batch, context))
