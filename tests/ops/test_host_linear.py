"""The product of a few rows on the CPU: against float64, every number of rows, with and without a bias."""

from __future__ import annotations

import pytest
import torch

from vattn.models.llama import Linear
from vattn.ops.host_linear import host_linear
from vattn.ops.ops_table import reference_ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 65])
@pytest.mark.parametrize("has_bias", [False, True])
def test_as_in_float64(dtype, rows, has_bias):
    weight = torch.randn(90, 130).to(dtype)
    bias = torch.randn(90).to(dtype) if has_bias else None
    wide = torch.randn(rows, 260).to(dtype)
    for x in (wide[:, :130], wide[:, :130].contiguous(), wide[:, ::2]):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for out in (host_linear(x, weight, bias), reference_ops().linear(x, weight, bias)):
            assert out.shape == (rows, 90)
            assert out.dtype == dtype
            assert out.is_contiguous()
            # Half precision rounds once, at the end. The others round each of 130 sums of about 11: that is some
            # sqrt(130) * 11 * eps / 2 together, and several times as much for the largest of thousands of errors.
            eps, most = torch.finfo(dtype).eps, 100 if dtype.itemsize == 2 else 400
            torch.testing.assert_close(out.double(), expected, rtol=4 * eps, atol=most * eps)


def test_layers_of_a_model_keep_other_shapes():
    """A module takes what ``nn.Linear`` takes: leading dimensions of any number."""
    layer = Linear(8, 5, dtype=torch.bfloat16).requires_grad_(False)
    for shape in ((8,), (1, 8), (2, 3, 8), (1, 1, 8)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(layer(x).double(), expected, rtol=0.03, atol=0.05)
