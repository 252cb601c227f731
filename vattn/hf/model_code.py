"""What the source of transformers' models says of their attention, where nothing else does."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["looks_attention_up", "may_look_attention_up", "models_of", "reader_of", "takes_cache"]

_OWN = tuple(os.path.dirname(file) + os.sep for file in (transformers.__file__, __file__))


@cache
def reader_of(forward: Callable[..., Any]) -> CodeType | None:
    """The code of an attention module's ``forward``, if it hands what the cache returned to its attention function and
    reads none of it before; else None.

    That is so where ``k, v = ….update(…)`` and ``attention_interface(self, q, k, v, …)`` are there once, neither name
    occurs anywhere else after the former, whichever way the code takes, and there are no loops and no functions inside.
    """
    forward = inspect.unwrap(forward)
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(forward)))))
    except (OSError, TypeError, SyntaxError):
        return None
    updates = [
        node
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "update"
    ]
    calls = [
        node
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
    ]
    others = (ast.Lambda, ast.AsyncFunctionDef, ast.For, ast.While)
    functions = sum(isinstance(node, ast.FunctionDef) for node in nodes)
    if len(updates) != 1 or len(calls) != 1 or functions != 1 or any(isinstance(node, others) for node in nodes):
        return None
    (target,), (call,) = updates[0].targets[:1], calls
    names = [name.id for name in getattr(target, "elts", ()) if isinstance(name, ast.Name)]
    given = [argument.id for argument in call.args[2:4] if isinstance(argument, ast.Name)]
    start = updates[0].end_lineno, updates[0].end_col_offset
    uses = [
        node
        for node in nodes
        if isinstance(node, ast.Name) and node.id in names and (node.lineno, node.col_offset) >= start
    ]
    follows = (call.lineno, call.col_offset) >= start
    if len(names) != 2 or len(updates[0].targets) != 1 or given != names or len(uses) != 2 or not follows:
        return None
    return getattr(forward, "__code__", None)


def models_of(config: PreTrainedConfig) -> tuple[Any, ...]:
    """The classes that transformers' auto classes make of a config; none, if they do not know it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        found = auto._model_mapping.get(type(config), None)
        if found is not None:
            return tuple(filter(None, found)) if isinstance(found, (tuple, list)) else (found,)
    return ()


def takes_cache(model: Any) -> bool:
    """Whether a model has a use for transformers' caches of K and V, which its ``forward`` may hand on by name only."""
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return False
    names = inspect.signature(model.forward).parameters
    if "past_key_values" in names:
        return True
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    try:
        return hands_on and any("past_key_values" in _source(module) for module in _modules_of(model))
    except (OSError, TypeError, KeyError):
        return hands_on


def looks_attention_up(config: PreTrainedConfig) -> bool:
    """Whether the model of this config takes its attention from transformers' registry, and that is all it asks."""
    models = models_of(config)
    return bool(models) and all(
        getattr(model, "_supports_attention_backend", False) and not any(map(_asks_more, _modules_of(model)))
        for model in models
    )


def may_look_attention_up(code: CodeType) -> bool:
    """Whether code that calls a cache's ``update`` may be of a model that ``looks_attention_up``: not where it is a
    user's, put in the place of transformers' attention, and names neither the registry nor what comes from there."""
    names = {*code.co_names, *code.co_varnames}
    return code.co_filename.startswith(_OWN) or not names.isdisjoint(("ALL_ATTENTION_FUNCTIONS", "attention_interface"))


def _modules_of(model: type) -> set[str]:
    """Those that have the code of a model and of what it inherits, but for what all models do."""
    return {kind.__module__ for kind in model.__mro__ if issubclass(kind, PreTrainedModel)} - {
        PreTrainedModel.__module__
    }


@cache
def _asks_more(module: str) -> bool:
    try:
        source = _source(module)
        return _compares_names(source) or _makes_masks(ast.parse(source))
    except (OSError, TypeError, KeyError, SyntaxError):
        return True  # who knows


def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


def _compares_names(source: str) -> bool:
    """Whether a model's code does one thing for ``"sdpa"`` and another for every other name, as Gemma 4's does."""
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", source) is not None


def _makes_masks(tree: ast.Module) -> bool:
    """Whether an attention that has a cache reads the mask it is given to make another, as Doge's and DeepSeek-V3.2's
    do: vattn's stands for a mask, and there is nothing in it to read."""

    def is_handed_on(value: ast.expr | None) -> bool:
        return value is None or isinstance(value, (ast.Name, ast.Constant))

    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        if not any(isinstance(call.func, ast.Attribute) and call.func.attr == "update" for call in calls):
            continue
        attends = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "attention_interface"]
        for call in attends:
            by_name = [keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"]
            mask = next(iter([*call.args[4:5], *by_name]), None)
            if not is_handed_on(mask) or (isinstance(mask, ast.Name) and mask.id != "attention_mask"):
                return True
        made = (
            is_handed_on(node.value)
            for node in nodes
            if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == "attention_mask" for target in node.targets)
        )
        if attends and not all(made):
            return True
    return False
