"""Values out of a model's files: of the right kind and within bounds, or an error that names key, bound and value."""

from __future__ import annotations

from typing import Any

import pytest

from vattn.errors import ConfigError
from vattn.models.files import Fields


def fields(value: Any) -> Fields:
    return Fields({"llama.x": value}, "model.gguf", prefix="llama.")


@pytest.mark.parametrize("value", [1, 7, 2**31 - 1])
def test_integers(value: int) -> None:
    assert fields(value).integer("x") == value


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, True, "1", [1], float("nan")])
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf: llama\.x must be an integer from 1 to 2147483647, got "):
        fields(value).integer("x")


def test_bounds_of_integers() -> None:
    assert fields(0).integer("x", minimum=0, maximum=3) == 0
    for value in (-1, 4):
        with pytest.raises(ConfigError, match=f"an integer from 0 to 3, got '?{value}"):
            fields(value).integer("x", minimum=0, maximum=3)


@pytest.mark.parametrize("value", [1, 1e-6, 2.5, 5e-324])
def test_numbers(value: float) -> None:
    number = fields(value).number("x")
    assert number == value
    assert type(number) is float


@pytest.mark.parametrize("value", [0, 0.0, -1, float("inf"), float("nan"), 10**400, True, "1", [1.0]])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"llama\.x must be a finite number above 0, got "):
        fields(value).number("x")


def test_zero_where_it_may_be() -> None:
    assert fields(0).number("x", zero=True) == 0.0
    with pytest.raises(ConfigError, match="a finite number of at least 0"):
        fields(-0.5).number("x", zero=True)


def test_flags() -> None:
    assert fields(True).flag("x", False) is True
    assert fields(False).flag("x", True) is False
    for value in (0, 1, "true"):
        with pytest.raises(ConfigError, match="must be true or false"):
            fields(value).flag("x", True)


@pytest.mark.parametrize("mapping", [{}, {"x": None}, {"llama.x": None}, {"y": 3}])
def test_what_is_absent_or_null_has_its_default(mapping: dict[str, Any]) -> None:
    absent = Fields(mapping, "model.gguf", prefix="llama.")
    assert absent.integer("x", 4) == 4
    assert absent.integer("x", None) is None
    assert absent.number("x", None) is None
    assert absent.flag("x", True) is True
    for read in (absent.raw, absent.integer, absent.number):
        with pytest.raises(ConfigError, match=r"model\.gguf lacks 'llama\.x'"):
            read("x")


@pytest.mark.parametrize("mapping", [None, [], "{}", 3])
def test_what_holds_no_keys(mapping: Any) -> None:
    with pytest.raises(ConfigError, match="must hold keys and values"):
        Fields(mapping, "config.json")


def test_a_value_of_a_hostile_file_is_escaped_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        fields("\x1b[2J\u202e" + "a" * 10_000).integer("x")
    assert not set("\x1b\u202e\n") & set(str(caught.value))
    assert len(str(caught.value)) < 1000
