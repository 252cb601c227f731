"""``vattn info MODEL``: the size of a model's K and V, and how many sequences fit. Reads no weights."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rich.table import Table

from ..engine.costs import SequenceCosts
from ..errors import ConfigError
from ..memory.backing import choose_memory_limit
from ..models import Llama
from ..tuning import default_attention
from .model import dtype_for, opened_driver, read_config
from .report import facts_table, format_bytes, show

__all__ = ["print_size", "size"]

_LENGTHS = (1024, 4096, 16384, 65536, 262144, 1048576)


def size(args: argparse.Namespace) -> dict[str, Any]:
    """Sizes in bytes, ready for JSON, for ``--memory-limit`` or the memory that a cache would take by default.

    Raises:
        ConfigError: no such model or device, or a limit below one page.
    """
    config = read_config(args.model)
    with opened_driver(args.device) as driver:
        page_bytes, device = driver.default_page_bytes, driver.device
        limit = choose_memory_limit(driver, args.memory_limit, page_bytes)
    dtype = dtype_for(args.dtype, device)
    with torch.device("meta"):  # shapes, no memory
        model = Llama(config).to(dtype)
    layout = model.kv_layout()
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    cache_bytes = limit if args.memory_limit is not None else max(limit - weight_bytes, 0)
    margin = _margin(layout, device, config.num_heads)
    whole_pages = cache_bytes // page_bytes * page_bytes
    costs = SequenceCosts(layout, page_bytes, margin)
    sequences = []
    for length in [*(length for length in _LENGTHS if length < layout.max_seq_len), layout.max_seq_len]:
        each = costs.bytes(length)
        sequences.append({"tokens": length, "bytes": each, "num_sequences": whole_pages // each})
    return {
        "model": args.model,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "num_layers": config.num_layers,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context_tokens": layout.max_seq_len,
        "bytes_per_token": layout.bytes_per_token,
        "page_bytes": page_bytes,
        "tokens_per_page": layout.tokens_per_page(page_bytes),
        "over_read_tokens": margin,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        "cache_bytes_are": "given" if args.memory_limit is not None else "90 % of what is free now, less the weights",
        "sequences": sequences,
    }


def _margin(layout: Any, device: torch.device, num_heads: int) -> int:
    """Rows past the end that the attention of ``vattn generate`` reads."""
    try:
        return default_attention(layout, device, num_heads).over_read_tokens
    except ConfigError:  # none runs there
        return 0


def print_size(document: dict[str, Any]) -> None:
    """The document of ``size`` as two tables."""
    shape = f"{document['num_layers']} layers, {document['num_kv_heads']} K and V heads of {document['head_dim']}"
    facts = [
        ("model", document["model"]),
        ("shape", f"{shape}, {document['context_tokens']} tokens of context"),
        ("weights", f"{format_bytes(document['weight_bytes'])} as {document['dtype']}"),
        ("K and V of a token", f"{format_bytes(document['bytes_per_token'])} as {document['dtype']}"),
        ("page", f"{format_bytes(document['page_bytes'])}, {document['tokens_per_page']:.1f} tokens"),
        (
            "memory for K and V",
            f"{format_bytes(document['cache_bytes'])} on {document['device']} ({document['cache_bytes_are']})",
        ),
    ]
    table = Table(title="\nsequences that fit", title_justify="left")
    for column in ("tokens", "each of them", "fit"):
        table.add_column(column, justify="right")
    for row in document["sequences"]:
        table.add_row(str(row["tokens"]), format_bytes(row["bytes"]), str(row["num_sequences"]))
    show(sys.stdout, facts_table(facts), table)
