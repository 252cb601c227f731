"""Attention backends, one file each. A backend declares what it can do; ``pick`` in ``choice`` is what chooses."""

from .base import (
    LEFT_PADDING,
    SINKS,
    SOFTCAP,
    AttentionBackend,
    PhasedAttention,
    bind,
    declared,
)
from .batch import AttentionBatch
from .captured_batch import DecodeBatch, PromptBatch
from .choice import (
    Needs,
    backends,
    choose,
    choose_phases,
    decode_backends,
    get,
    pick,
    reason_against,
    require_fit,
)
from .triton_decode import DecodeWorkspace, TritonDecodeAttention

__all__ = [
    "LEFT_PADDING",
    "SINKS",
    "SOFTCAP",
    "AttentionBackend",
    "AttentionBatch",
    "DecodeBatch",
    "DecodeWorkspace",
    "Needs",
    "PhasedAttention",
    "PromptBatch",
    "TritonDecodeAttention",
    "backends",
    "bind",
    "choose",
    "choose_phases",
    "declared",
    "decode_backends",
    "get",
    "pick",
    "reason_against",
    "require_fit",
]
