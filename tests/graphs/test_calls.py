"""A ``Capturable`` is called as its module; arguments, signatures and what a graph takes for granted."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from helpers import graph_faults as faults
from torch import nn

from vattn import ConfigError
from vattn.graphs import make_capturable
from vattn.graphs.inputs import Inputs
from vattn.graphs.state import Buffers, State, same_bits
from vattn.graphs.trees import flatten, map_tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_a_gpu_the_forward_runs():
    module = faults.HostMask()
    made = make_capturable(module, (torch.ones(3, 8),))
    assert made.capturable
    assert made.report.num_graphs == 0
    module.mask = torch.zeros(8)
    x = torch.randn(3, 8)
    assert torch.equal(made(x), faults.Linear.forward(module, x))
    assert made.eager_calls == {"nothing was captured": 1}


def test_undo_frees_constants_and_can_be_repeated():
    with make_capturable(faults.HostMask(), (torch.ones(3, 8),)) as made:
        assert made.report.constant_bytes == 32
    made.undo()
    assert made.report.constant_bytes == 0
    assert made(torch.ones(3, 8)).shape == (3, 8)


def test_a_compiled_module_stays_compiled():
    runs = []

    def backend(graph, _):
        def run(*tensors):
            runs.append(graph)
            return graph(*tensors)

        return run

    module, x = torch.compile(faults.HostMask().eval(), backend=backend), torch.ones(3, 8)
    with torch.no_grad():
        module(x)
        assert len(runs) == 1
        made = make_capturable(module, (x,))
        assert [finding.operation for finding in made.report.findings] == ["torch.Tensor.to"]
        assert len(runs) == 1  # what is watched is the forward as it was written
        torch.testing.assert_close(made(x), faults.HostMask().eval()(x))
        assert len(runs) == 2


def test_gradients_flow_through_an_eager_call():
    module = faults.Linear()
    make_capturable(module, (torch.ones(3, 8),))(torch.ones(3, 8)).sum().backward()
    assert module.weight.grad is not None


def test_another_signature_adds_its_findings():
    class LongOnly(faults.Linear):
        def forward(self, x):
            return super().forward(x) * (float(x.sum()) if len(x) > 3 else 1)

    made = make_capturable(LongOnly(), (torch.ones(3, 8),))
    assert made.capturable
    assert not made.capture(torch.ones(4, 8)).capturable
    assert len(made.report.findings) == 1


@pytest.mark.parametrize(
    ("module", "example", "another", "message"),
    [
        (len, (), None, "module must be a torch.nn.Module, got a builtin_function_or_method"),
        (faults.Linear(), torch.ones(3, 8), None, "example must be a tuple of arguments, or a dict .* got a Tensor"),
        (faults.Linear(), {1: torch.ones(3, 8)}, None, "example must be a tuple"),
        (faults.Linear(), (object(),), None, "tensors, plain values, tuples, lists and dicts, got a object"),
        (faults.Linear(), (torch.ones(3, 8).to_sparse(),), None, "got a Tensor"),
        (faults.Linear(), (torch.ones(3, 8),), (torch.ones(4, 8),), "another must have the structure"),
    ],
)
def test_wrong_arguments_are_refused(module, example, another, message):
    with pytest.raises(ConfigError, match=message):
        make_capturable(module, example, another)


def test_what_the_forward_raises_comes_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        make_capturable(faults.Linear(), (torch.ones(3, 7),))


@dataclasses.dataclass(frozen=True)
class Output:
    y: torch.Tensor
    more: dict[str, torch.Tensor]


Pair = collections.namedtuple("Pair", ["one", "other"])


@pytest.mark.parametrize(
    "tree",
    [
        torch.ones(2),
        (torch.ones(2), [torch.zeros(3), None, 1, "x"]),
        {"a": torch.ones(2), "b": {"c": (torch.zeros(1),)}},
        collections.OrderedDict(a=torch.ones(2)),
        Pair(torch.ones(2), 5),
        Output(torch.ones(2), {"z": torch.zeros(3)}),
    ],
)
def test_a_tree_keeps_its_structure(tree):
    doubled = map_tensors(tree, lambda tensor: tensor + 1)
    assert type(doubled) is type(tree)
    assert repr(map_tensors(doubled, lambda tensor: tensor - 1)) == repr(tree)
    assert repr(doubled) != repr(tree)


def test_outputs_of_transformers_are_trees():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    tree = outputs.CausalLMOutputWithPast(logits=torch.ones(2), hidden_states=(torch.zeros(1), torch.ones(1)))
    copied = map_tensors(tree, torch.clone)
    assert type(copied) is type(tree)
    assert copied.keys() == tree.keys()
    assert copied.logits is not tree.logits
    assert torch.equal(copied["hidden_states"][1], tree.hidden_states[1])


@pytest.mark.parametrize("value", [{1, 2}, object(), collections.UserDict(a=1), torch.ones(2).to_sparse()])
def test_a_tree_of_something_else_is_refused(value):
    with pytest.raises(ConfigError, match=f"a {type(value).__name__} in the output"):
        map_tensors([value], torch.clone)


def key(*args, **kwargs):
    return Inputs(args, kwargs).key


def test_a_signature_is_all_but_the_values_of_tensors():
    x = torch.ones(2, 3)
    assert key(x, scale=2, n=[x]) == key(x + 1, n=[x * 2], scale=2)
    different = [
        key(x),
        key(x[:1]),
        key(x.double()),
        key(x.tolist()),
        key((x,)),
        key([x]),
        key(a=x),
        key(b=x),
        key(x, 1),
    ]
    different += [key(x, True), key(x, 1.0), key(x, None), key({"a": x}), key(x.to("meta"))]
    assert len(set(different)) == len(different)
    assert flatten({"a": x}, []) == flatten({"a": x}, [])


def test_tensors_of_the_cpu_are_values_where_others_are_on_a_device():
    inputs = Inputs((torch.ones(2, device="meta"), torch.ones(2)), {})
    assert [len(inputs.on_device), len(inputs.on_host)] == [1, 1]
    assert inputs.same_on_host(Inputs((torch.ones(2, device="meta"), torch.ones(2)), {}))
    assert not inputs.same_on_host(Inputs((torch.ones(2, device="meta"), torch.zeros(2)), {}))


def test_shuffled_values_are_the_same_ones_elsewhere():
    ids, values = torch.arange(64).flip(0).reshape(8, 8), torch.randn(8, 8)
    offsets, mask = torch.tensor([0, 3, 3, 9]), torch.tensor([[True, False], [False, True]])
    other = Inputs((ids, offsets, torch.tensor(7)), {"values": values, "mask": mask}).shuffled(CPU)
    assert other.key == key(ids, offsets, torch.tensor(7), values=values, mask=mask)
    assert not torch.equal(other.args[0], ids)
    assert torch.equal(other.args[0].flatten().sort().values, ids.flatten().sort().values)
    assert torch.equal(other.args[1], offsets)
    assert other.args[2] == 7
    assert torch.allclose(other.kwargs["values"].flatten().sort().values, values.flatten().sort().values * 0.75)
    assert other.kwargs["mask"].sum() == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())), "0.weight was replaced"),
        (lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()), "0.weight was moved"),
        (lambda m: setattr(m[0].weight, "data", m[0].weight.data.T), "0.weight was moved"),
        (lambda m: m[0].double(), "0.scale was replaced"),
        (lambda m: setattr(m[0], "scale", torch.ones(8)), "0.scale was replaced"),
        (lambda m: setattr(m[0], "mask", torch.ones(8)), "0.mask was replaced"),
        (lambda m: m[0].mask.add_(1), "0.mask, a tensor of the CPU, was written to"),
        (lambda m: setattr(m, "1", faults.Linear()), "1 was replaced"),
        (lambda m: m.append(faults.Linear()), "2 was replaced"),
        (lambda m: m.__delitem__(1), "1 was replaced"),
        (lambda m: m[0].register_forward_hook(print), "a hook or a first entry of a dict was added"),
        (lambda m: m.train(), "training was changed"),
        (lambda m: setattr(m[1], "calls", 7), "1.calls was changed"),
    ],
)
def test_a_change_of_the_module_is_seen(change, words):
    module = nn.Sequential(faults.HostMask(), faults.Counts()).eval()
    state = State(module, CUDA)
    assert state.change() is None
    change(module)
    assert state.change() == words


def test_weights_written_in_place_are_no_change_and_a_change_taken_back_is_none():
    module = faults.Counts().eval()
    state = State(module, CPU)
    with torch.no_grad():
        module.weight.mul_(2)
        module.scale.zero_()
    module.train().eval()
    assert state.change() is None


def test_buffers_are_put_back():
    module = faults.Linear()
    buffers, before = Buffers(module), module.scale.clone()
    module.scale.zero_()
    assert not torch.equal(buffers.values()[0], before)
    buffers.restore()
    assert torch.equal(module.scale, before)


def test_bits_are_compared():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert same_bits(torch.tensor(True), torch.tensor(True))
    assert same_bits(torch.ones(4, 2).T, torch.ones(2, 4))
    assert not same_bits(nan, torch.tensor([1.0, 1.0]))
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.int32))
