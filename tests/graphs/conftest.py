"""Choices that tests make are not kept for the user, nor for other tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_choices(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
