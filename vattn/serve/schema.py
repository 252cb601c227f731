"""What a JSON schema may ask for: what is not kept to is refused, rather than passed over in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..arguments import escaped, shown
from ..errors import ConfigError

__all__ = ["check_schema", "schemas_of"]

# xgrammar 0.2.8 compiles a schema with these and accepts what they forbid.
_NOT_KEPT = (
    *("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
)
_ALONE = ("anyOf", "oneOf", "allOf", "$ref")  # xgrammar passes over one of these, or what stands beside it
_BESIDE = ("properties", "required", "items", "prefixItems", "enum", "const", "pattern", "additionalProperties")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # of schemas by name
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
# Repetitions of repetitions, multiplied: a bound of the states that each character of an answer may begin.
_MAX_REPEATS = 10_000
_MAX_DEPTH = 64
_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(?:,(\d*))?\}")


def check_schema(where: str, schema: Mapping[str, Any]) -> None:
    """Refuse what grammars do not keep to.

    Raises:
        ConfigError: names the place.
    """
    todo: list[tuple[str, Any, int]] = [(where, schema, 0)]
    num_repeats = 0
    while todo:
        at, part, depth = todo.pop()
        if not isinstance(part, Mapping):
            continue
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{where} has more than {_MAX_DEPTH} schemas within each other")
        _check_part(at, part)
        inside: list[tuple[str, Any]] = []
        pattern = part.get("pattern")
        if isinstance(pattern, str):
            num_repeats += _num_repeats(pattern)
        for name in _NAMED:
            if isinstance(part.get(name), Mapping):
                inside += [(f"{at}.{name}.{escaped(str(key), 40)}", value) for key, value in part[name].items()]
                num_repeats += sum(map(_num_repeats, part[name])) if name == "patternProperties" else 0
        for name in _LISTS:
            if isinstance(part.get(name), list):
                inside += [(f"{at}.{name}[{i}]", value) for i, value in enumerate(part[name])]
        inside += [(f"{at}.{name}", part[name]) for name in _ONE if name in part]
        todo += [(place, value, depth + 1) for place, value in inside]
        if num_repeats > _MAX_REPEATS:
            raise ConfigError(f"{at}: patterns may repeat {_MAX_REPEATS} parts in all, got {num_repeats}")


def schemas_of(tag: Any) -> Iterator[Mapping[str, Any]]:
    """The schemas in a structural tag of xgrammar, which ``tools.grammar_for`` made."""
    if isinstance(tag, Mapping):
        if tag.get("type") == "json_schema":
            yield tag["json_schema"]
        else:
            for value in tag.values():
                yield from schemas_of(value)
    elif isinstance(tag, list):
        for value in tag:
            yield from schemas_of(value)


def _check_part(at: str, part: Mapping[str, Any]) -> None:
    for name in _NOT_KEPT:
        if name in part and part[name] is not False:
            raise ConfigError(f"{at}.{name} is not supported; leave it out, and check the answer")
    for name in _ALONE:
        beside = [other for other in (*_BESIDE, *_ALONE) if other in part and other != name]
        if name in part and beside:
            raise ConfigError(f"{at}: {name} beside {beside[0]} is not supported; write them as one")
    if isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1:
        raise ConfigError(f"{at}.allOf of several schemas is not supported; write them as one")
    reference = part.get("$ref")
    if reference is not None and (not isinstance(reference, str) or not re.match(r"#(/|$)", reference)):
        raise ConfigError(f"{at}.$ref must point into the schema, as '#/$defs/name', got {escaped(shown(reference))}")
    required, properties = part.get("required", ()), part.get("properties", {})
    if isinstance(required, list) and isinstance(properties, Mapping):
        for name in required:
            if name not in properties:
                raise ConfigError(f"{at}.required names {escaped(shown(name))}, which is not in its properties")
    pattern = part.get("pattern")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ConfigError(f"{at}.pattern must be a string, got {escaped(shown(pattern))}")
        if re.search(r"\(\?<?[=!]", pattern):
            raise ConfigError(f"{at}.pattern looks ahead or behind, which is not supported: {escaped(shown(pattern))}")
        if "minLength" in part or "maxLength" in part:
            raise ConfigError(f"{at}: pattern beside minLength or maxLength is not supported; put it into the pattern")


def _num_repeats(pattern: str) -> int:
    """How many parts a pattern has when its bounded repetitions are written out."""
    open_groups, total, last, i = [], 0, 0, 0  # parts before each open group; of this one; of its last part
    while i < len(pattern):
        if (found := _QUANTIFIER.match(pattern, i)) and last:
            low, high = found[1], found[2]
            total += last * (max(int(high or low), 1) - 1) if low else 0
            i, last = found.end(), 0
            continue
        letter = pattern[i]
        if letter == "(":
            open_groups.append(total)
            total = 0
        elif letter == ")" and open_groups:
            last = max(total, 1)
            total = last + open_groups.pop()
        else:
            if letter == "[":  # a class, up to the first ] that is not its first character
                found = re.compile(r"\[\^?\]?(\\.|[^\]\\])*\]").match(pattern, i)
                i = found.end() - 1 if found else i
            i += letter == "\\"
            last = 1
            total += 1
        if letter == "(":
            last = 0
        i += 1
    return total
