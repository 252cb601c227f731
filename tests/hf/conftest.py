"""A small model to change, and one that no test changes."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from tests.helpers.hf_models import make_model


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("Llama")


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return make_model("Llama")
