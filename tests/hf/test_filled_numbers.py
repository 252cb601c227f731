"""Layers that make a tensor of a number in every pass: the device fills it, so that a CUDA graph can hold the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.hf_models import make_model, prompt
from vattn import Engine, Request
from vattn.graphs.constants import Constants
from vattn.graphs.watch import Watch
from vattn.hf import TransformersModel
from vattn.hf.capturable import FilledNumbers
from vattn.hf.fusion_check import Probe


def number_in_layer(how: str) -> Any:
    """A model with a layer that makes one, as Gemma 3n and others do."""
    model = make_model("Llama")
    mlp = model.model.layers[1].mlp
    own = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        half = torch.tensor(0.5, device=x.device) if how == "made there" else torch.as_tensor(0.5, device=x.device)
        return own(x) * half

    mlp.forward = forward
    return model


@torch.no_grad()
def brought(model: Any, run: Any) -> list[str]:
    """What a run brings to the device in a way that a graph cannot hold by itself, as ``make_capturable`` finds it."""
    tokens, positions = torch.tensor([1, 2, 3, 4]), torch.arange(4)
    probe = Probe(positions)
    inputs = [tokens, positions, probe.slots, probe.rows]
    resident = [*model.parameters(), *model.buffers(), *inputs]
    watch = Watch(torch.device("cpu"), Constants(), learn=True, resident=resident)
    with watch.watching():
        run(tokens, probe)
    return [finding.operation for finding in watch.findings.values()]


@pytest.mark.parametrize("how", ["made there", "as a tensor"])
def test_no_pass_brings_a_number_from_the_host(how: str) -> None:
    model = number_in_layer(how)
    wanted = model.generate(prompt(1), max_new_tokens=8, do_sample=False)[0, prompt(1).shape[1] :].tolist()
    operation = "torch.tensor" if how == "made there" else "torch.as_tensor"
    plain, more = (
        brought(each, lambda tokens, probe, each=each: each(tokens[None])) for each in (make_model("Llama"), model)
    )
    assert more.count(operation) == plain.count(operation) + 1
    with TransformersModel(model) as ours:
        assert brought(model, ours._forward) == []
        with Engine(ours, max_batch=1, memory_limit=1 << 26) as engine:
            tokens = engine.generate([Request(prompt(1)[0].tolist(), max_new_tokens=8)])[0].tokens
    assert list(tokens) == wanted


def test_a_family_that_makes_one() -> None:
    name = "Gemma 3n, shared K and V"
    model = make_model(name, activation_sparsity_pattern=[0.5, 0.0] * 2)
    wanted = model.generate(prompt(1), max_new_tokens=8, do_sample=False)[0, prompt(1).shape[1] :].tolist()
    assert "torch.tensor" in brought(model, lambda tokens, probe: model(tokens[None]))
    with TransformersModel(model) as ours:
        assert "torch.tensor" not in brought(model, ours._forward)
        with Engine(ours, max_batch=1, memory_limit=1 << 26) as engine:
            tokens = engine.generate([Request(prompt(1)[0].tolist(), max_new_tokens=8)])[0].tokens
    assert list(tokens) == wanted


@pytest.mark.parametrize("value", [0.1, -3, True])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"dtype": torch.int32}])
def test_a_filled_number_is_the_same(value: Any, options: dict[str, Any]) -> None:
    wanted = torch.tensor(value, device="cpu", **options)
    with FilledNumbers() as numbers:
        found = torch.tensor(value, device="cpu", **options)
    assert numbers.count == 1
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.equal(found, wanted)


def test_a_number_that_is_moved() -> None:
    number = torch.tensor(0.1)
    with FilledNumbers() as numbers:
        moved = [number.to("meta"), number.to(torch.device("meta"), torch.float64), number.to(device="meta")]
        assert numbers.count == 3
        number.to(torch.float16).to("cpu")
        torch.zeros(1).to("meta")
        torch.tensor([0.1, 0.2], device="cpu")
        assert numbers.count == 3
    assert [each.dtype for each in moved] == [torch.float32, torch.float64, torch.float32]
    assert all(each.device.type == "meta" and each.shape == () for each in moved)
