"""Which kernel for which shape, by measurement."""

from .table import (
    TuningTable,
    decode_attention,
    default_attention,
    default_decode,
    default_ops,
    dtype_name,
    measured_attention,
    table_for,
    table_paths,
)

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
