"""Modules of functions, captured so that their inputs are read where they are."""

from __future__ import annotations

import torch
from torch import nn

from vattn.graphs import make_capturable


class Function(nn.Module):
    """A module of a function of tensors."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def floats(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def ids(*shape, seed=0, below=100):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def indirect(module, *example, copied=(), **options):
    """Captured, after a look that all inputs but ``copied`` are read where they are."""
    module = module if isinstance(module, nn.Module) else Function(module)
    made = make_capturable(module.cuda(), example, choice="indirect", **options)
    assert made.report.num_graphs == 1, made.report
    (signature,) = made.report.signatures
    assert [int(line.split(":")[0]) for line in signature.copied] == list(copied), signature
    moved = [tensor for number, tensor in enumerate(example) if number not in copied]
    assert signature.moved_bytes == sum(tensor.nbytes for tensor in moved)
    assert signature.choice == ("indirect" if moved else "graph")
    return made


def same(made, *tensors, exact=True):
    with torch.no_grad():
        found, expected = made(*tensors), made.module(*tensors)
    close = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(found, expected, **close)
    assert not made.eager_calls, made.eager_calls
    return found
