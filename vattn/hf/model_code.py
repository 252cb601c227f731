"""What the source of transformers' models says of their attention, where nothing else does."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["hands_on", "looks_attention_up"]


@cache
def hands_on(kind: Any) -> bool:
    """Whether an attention module's ``forward`` hands what the cache returned to its attention, reading none before.

    That is so where ``k, v = ….update(…)`` is there once, and neither name between it and ``attention_interface(…)``.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    nodes = list(ast.walk(tree))
    updates = [
        node
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "update"
    ]
    if len(updates) != 1 or not isinstance(updates[0].targets[0], ast.Tuple):
        return False
    names = {name.id for name in updates[0].targets[0].elts if isinstance(name, ast.Name)}
    end = updates[0].end_lineno or 0
    calls = [
        node.lineno
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
    ]
    if len(names) != 2 or len(updates[0].targets) != 1 or len(calls) != 1 or calls[0] <= end:
        return False
    between = (node for node in nodes if isinstance(node, ast.Name) and end < node.lineno < calls[0])
    return not any(node.id in names for node in between)


def looks_attention_up(config: PreTrainedConfig) -> bool:
    """Whether the model of this config takes its attention from transformers' registry, and that is all it asks."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        found = auto._model_mapping.get(type(config), None)
        if found is not None:
            kinds = found if isinstance(found, (tuple, list)) else (found,)
            return all(
                getattr(kind, "_supports_attention_backend", False) and not _compares_names(kind.__module__)
                for kind in kinds
            )
    return False


@cache
def _compares_names(module: str) -> bool:
    """Whether a model's code does one thing for ``"sdpa"`` and another for every other name, as Gemma 4's does."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return False
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", source) is not None
