"""Layers that make a tensor of a number in every pass: the device fills it, so that a CUDA graph can hold the pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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
    own, kept = mlp.forward, torch.tensor(0.5)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "made there": lambda x: torch.tensor(0.5, device=x.device),
        "as a tensor": lambda x: torch.as_tensor(0.5, device=x.device),
        "NumPy's": lambda x: torch.tensor(np.float32(0.5), device=x.device),
        "as an array": lambda x: torch.asarray(np.array(0.5, np.float32), device=x.device),
        "like another": lambda x: x.new_tensor(0.5),
        "of one of the CPU": lambda x: x.new_tensor(kept),
        "moved to another": lambda x: kept.to(x),
        "taken": lambda x: torch.where(x.isnan(), x, kept),
    }

    def forward(x: torch.Tensor) -> torch.Tensor:
        return own(x) * ways[how](x)

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


MADE = {
    "made there": "torch.tensor",
    "as a tensor": "torch.as_tensor",
    "NumPy's": "torch.tensor",
    "as an array": "torch.asarray",
    "like another": "torch.Tensor.new_tensor",
    "of one of the CPU": "torch.Tensor.new_tensor",
}


@pytest.mark.parametrize(("how", "operation"), MADE.items())
def test_no_pass_brings_a_number_from_the_host(how: str, operation: str) -> None:
    model = number_in_layer(how)
    wanted = model.generate(prompt(1), max_new_tokens=8, do_sample=False)[0, prompt(1).shape[1] :].tolist()
    plain, more = (
        brought(each, lambda tokens, probe, each=each: each(tokens[None])) for each in (make_model("Llama"), model)
    )
    assert more.count(operation) == plain.count(operation) + 1
    with TransformersModel(model) as ours:
        assert brought(model, ours._forward) == []
        with Engine(ours, max_batch=1, memory_limit=1 << 26) as engine:
            tokens = engine.generate([Request(prompt(1)[0].tolist(), max_new_tokens=8)])[0].tokens
    assert list(tokens) == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("how", [*MADE, "moved to another", "taken"])
def test_a_graph_holds_the_pass(how: str) -> None:
    """An engine captures every step before the first request."""
    model = number_in_layer(how).to("cuda")
    tokens = prompt(1).to("cuda")
    wanted = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :].tolist()
    with TransformersModel(model) as ours, Engine(ours, max_batch=1, memory_limit=1 << 26) as engine:
        found = engine.generate([Request(tokens[0].tolist(), max_new_tokens=8)])[0].tokens
    assert list(found) == wanted


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


def there(number: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What brings a number of the CPU to the device of ``values`` and ``mask``, ``[3]``."""
    return {
        "to another": lambda: number.to(values),
        "as the type of another": lambda: number.type_as(values.double()),
        "tensor": lambda: torch.tensor(number.numpy(), device=values.device),
        "where": lambda: torch.where(mask, values, number),
        "where, of a tensor": lambda: values.where(mask, number),
        "where, by name": lambda: torch.where(mask, input=values, other=number),
        "copy": lambda: values.copy_(number),
        "assignment to a mask": lambda: values.__setitem__(mask, number),
        "assignment to a slice": lambda: values.__setitem__(slice(0, 2), number),
        "assignment to a row": lambda: values.__setitem__(torch.tensor(1), number),
        "assignment by index": lambda: values.index_put_((torch.zeros(1, dtype=torch.int64, device="meta"),), number),
    }


@pytest.mark.parametrize("how", list(there(*torch.zeros(3))))
def test_a_number_that_is_taken(how: str) -> None:
    """On ``meta``, another device than the CPU, where nothing is computed."""
    values, mask = torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.bool, device="meta")
    bring = there(torch.tensor(0.5), values, mask)[how]
    wanted = bring()
    with FilledNumbers() as numbers:
        found = bring()
    assert numbers.count == 1
    if wanted is not None:
        assert (found.device, found.dtype, found.shape) == (wanted.device, wanted.dtype, wanted.shape)


def test_what_is_on_the_cpu_stays_there() -> None:
    number, values = torch.tensor(0.5), torch.arange(3.0)
    with FilledNumbers() as numbers:
        values[torch.tensor(1)] = number
        found = torch.where(values > 0.6, values, number)
        number.copy_(torch.tensor(2.0))
        number.to(torch.float16)
        assert numbers.count == 0
    assert found.tolist() == [0.5, 0.5, 2.0]
    assert number == 2


def test_a_number_of_the_default_device() -> None:
    with torch.device("meta"), FilledNumbers() as numbers:
        assert torch.tensor(0.5).device.type == "meta"
    assert numbers.count == 1
