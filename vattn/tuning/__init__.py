"""Which kernel for which shape, by measurement."""

from .table import (
    TuningTable,
    default_attention,
    default_decode,
    default_ops,
    dtype_name,
    table_for,
    table_paths,
    table_to_add_to,
)

__all__ = [
    "TuningTable",
    "default_attention",
    "default_decode",
    "default_ops",
    "dtype_name",
    "table_for",
    "table_paths",
    "table_to_add_to",
]
