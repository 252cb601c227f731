"""What keeps a forward out of a graph is found, with the line where it stands; without a GPU too."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import graph_faults as faults
from torch import nn

from vattn.graphs import Finding, Report, make_capturable


def example(seed=0):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


def unmended(made):
    return [finding for finding in made.report.findings if not finding.mended]


def named(findings):
    return [(finding.kind, finding.operation, finding.file, finding.line) for finding in findings]


@pytest.mark.parametrize(
    ("module", "kind", "operation"), faults.UNMENDABLE, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_fault_is_found_where_it_stands(module, kind, operation):
    made = make_capturable(module(), (example(),))
    assert not made.capturable
    found = named(unmended(made))
    assert (kind, operation, *faults.fault_of(module)) in found
    assert {(file, line) for kind, _, file, line in found if kind != "state"} == {faults.fault_of(module)}
    assert f"{faults.fault_of(module)[1]}: {kind}: {operation}" in str(made.report)
    assert "stays eager" in str(made.report)


@pytest.mark.parametrize(
    ("module", "kind", "operation"), faults.UNMENDABLE_LATER, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_fault_without_a_line_is_found(module, kind, operation):
    made = make_capturable(module(), (example(),))
    assert named(unmended(made)) == [(kind, operation, "", 0)]


@pytest.mark.parametrize(("module", "operation"), faults.MENDABLE, ids=lambda value: getattr(value, "__name__", None))
def test_what_the_cpu_brings_is_mended(module, operation):
    made = make_capturable(module(), (example(),))
    assert made.capturable
    if module is faults.HostWrite and not made.report.findings:
        return  # from 2.15 on PyTorch makes no tensor of the number
    assert named(made.report.findings) == [("host", operation, *faults.fault_of(module))]
    assert "mended" in str(made.report)
    assert (made.report.constant_bytes > 0) == (module not in (faults.HostNumber, faults.HostWrite))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * 2 + torch.zeros_like(x) + torch.arange(8, device=x.device),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: torch.repeat_interleave(x, 2, 0) + torch.nonzero_static(x, size=3).sum(),
        lambda x: torch.repeat_interleave(x[0].long().clamp(0, 0) + 2, output_size=16),
        lambda x: nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        lambda x: sum(row.sum() for row in x[:, 2:5]) + x.view(torch.Size([8, 3]))[None, ..., 0],
        lambda x: nn.functional.dropout(x, 0.5, False).topk(2).values.sort().indices,
        lambda x: nn.functional.embedding_bag(x.long().abs(), x),  # makes offsets in its midst
        lambda x: x.to_sparse() @ x.T,
        lambda x: x.new_zeros(3).to(torch.bfloat16).to(x),
    ],
)
def test_a_clean_forward_has_no_findings(forward):
    class Clean(faults.Linear):
        def forward(self, x):
            return forward(x)

    made = make_capturable(Clean(), (example(),))
    assert made.report.findings == ()
    assert made.capturable
    assert str(made.report) == "Clean on cpu: can be captured"


def test_a_mask_that_is_filled_is_no_fault():
    class Fills(faults.Linear):
        def forward(self, x):
            y = super().forward(x)
            y[y > 0] = 1.0
            return y

    assert make_capturable(Fills(), (example(),)).capturable


def test_constants_that_change_places_are_found():
    class Swaps(faults.Counts):
        def forward(self, x):
            y = super().forward(x)
            one, other = (
                torch.full((8,), float(number)).to(x.device) for number in (self.calls % 2, 1 - self.calls % 2)
            )
            return y * one + other

    kinds = [finding.kind for finding in unmended(make_capturable(Swaps(), (example(),)))]
    assert kinds == ["changes", "state"]


def test_a_fault_in_a_loop_is_one_finding():
    class Loop(faults.Linear):
        def forward(self, x):
            return sum(super(Loop, self).forward(x) * float(x[row, 0]) for row in range(3))

    (finding,) = make_capturable(Loop(), (example(),)).report.findings
    assert finding.count == 3
    assert "(3 times)" in str(finding)


def test_a_library_in_between_is_named_by_the_line_that_is_not_pytorchs():
    made = make_capturable(nn.Sequential(faults.Linear(), nn.Sequential(faults.Item())), (example(),))
    assert named(unmended(made))[0][2:] == faults.fault_of(faults.Item)


def test_training_finds_dropout_and_eval_does_not():
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    assert not make_capturable(module.train(), (example(),)).capturable
    assert make_capturable(module.eval(), (example(),)).capturable


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32)).eval()
    assert make_capturable(vision, {"pixel_values": torch.randn(1, 3, 32, 32)}).report.findings == ()
    config = transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=64)
    decoder = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    made = make_capturable(decoder, {"input_ids": ids, "use_cache": False})
    # Masks are looked at, but not under capture, which a CPU does not have.
    assert {(finding.kind, Path(finding.file).stem) for finding in made.report.findings} <= {("read", "masking_utils")}
    made = make_capturable(decoder, {"input_ids": ids, "use_cache": True})
    assert "output: a DynamicCache in the output: return tensors" in str(made.report)


def test_a_batch_norm_in_training_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    before = copy.deepcopy(module.state_dict())
    assert make_capturable(module, (example(),)).capturable
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_random_numbers_go_on_where_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_capturable(faults.HostRandom(), (example(),))
    assert torch.equal(torch.rand(3), expected)


def test_the_example_is_left_as_it_was():
    given = example()
    make_capturable(faults.WritesArgument(), (given,))
    assert torch.equal(given, example())


def test_a_report_cannot_be_changed():
    made = make_capturable(faults.Item(), (example(),))
    for part, name in ((made.report, "device"), (made.report.findings[0], "line")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)
    assert isinstance(made.report, Report)
    assert isinstance(made.report.findings[0], Finding)
