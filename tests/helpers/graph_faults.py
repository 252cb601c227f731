"""Modules with one fault each that keeps them out of a CUDA graph, on the line that ends with ``# fault``."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from torch import nn


class Linear(nn.Module):
    """Nothing wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=generator))
        self.register_buffer("scale", torch.rand(8, generator=generator))

    def forward(self, x):
        return torch.tanh(x @ self.weight) * self.scale


class Item(Linear):
    def forward(self, x):
        y = super().forward(x)
        return y * float(y.sum())  # fault


class ItemCall(Linear):
    def forward(self, x):
        y = super().forward(x)
        return y * y.amax().item()  # fault


class Branch(Linear):
    def forward(self, x):
        if (x > 0).all():  # fault
            return super().forward(x)
        return super().forward(-x)


class ToList(Linear):
    def forward(self, x):
        rows = x[0].tolist()  # fault
        return super().forward(x) * rows[0]


class ToHost(Linear):
    def forward(self, x):
        y = super().forward(x)
        y.cpu()  # fault
        return y


class ToHostNamed(Linear):
    def forward(self, x):
        y = super().forward(x)
        y.to("cpu", torch.float64)  # fault
        return y


class NonZero(Linear):
    def forward(self, x):
        return super().forward(x), x.nonzero()  # fault


class Masked(Linear):
    def forward(self, x):
        y = super().forward(x)
        return y[y > 0]  # fault


class MaskedWrite(Linear):
    def forward(self, x):
        y = super().forward(x)
        y[y > 0] = y.sum()  # fault
        return y


class Repeats(Linear):
    def forward(self, x):
        counts = (x[0] > 0).long()
        return super().forward(x), torch.repeat_interleave(counts)  # fault


class Experts(Linear):
    """Experts by a loop over those that were chosen, as many a mixture of experts is written."""

    def forward(self, x):
        y = super().forward(x)
        chosen = y.argmax(-1)
        for expert in chosen.unique():  # fault
            y = torch.where((chosen == expert)[:, None], y + 1, y)
        return y


class Dropout(Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)  # fault


class HostRandom(Linear):
    def forward(self, x):
        noise = torch.rand(8)  # fault
        return super().forward(x) + noise.to(x.device)


class WritesArgument(Linear):
    def forward(self, x):
        x += 1
        return super().forward(x)


class Counts(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountsIn(Counts):
    def forward(self, x):
        y = super().forward(x)
        return y * self.calls  # fault


class NewTable(Counts):
    """A table of the CPU that is another one in each call."""

    def forward(self, x):
        y = super().forward(x)
        return y + torch.full((8,), self.calls).to(x.device)  # fault


class Opaque(Linear):
    def forward(self, x):
        return {"y": super().forward(x), "more": {1, 2}}


class HostMask(Linear):
    """The mask is an attribute, so that ``.to(device)`` of the module leaves it on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.linspace(0, 1, 8)

    def forward(self, x):
        return super().forward(x) + self.mask.to(x.device)  # fault


class HostTable(Linear):
    """Positions made on the CPU in each call."""

    def forward(self, x):
        table = torch.sin(torch.arange(8) / 3)
        return super().forward(x) + table.to(x.device, x.dtype)  # fault


class HostList(Linear):
    def forward(self, x):
        return super().forward(x) * torch.tensor([1.0, 2.0] * 4, device=x.device)  # fault


class HostIndex(Linear):
    def forward(self, x):
        order = torch.arange(7, -1, -1)
        return super().forward(x)[:, order]  # fault


class HostListIndex(Linear):
    def forward(self, x):
        return super().forward(x)[:, [7, 0, 3]]  # fault


class HostArrayIndex(Linear):
    def forward(self, x):
        return super().forward(x)[:, np.array([5, 1])]  # fault


class HostWrite(Linear):
    def forward(self, x):
        y = super().forward(x)
        y[:, torch.arange(3, device=x.device)] = 1.0  # fault
        return y


class HostNumber(Linear):
    def forward(self, x):
        return super().forward(x) * torch.tensor(3.0)  # fault


# (module, kind, operation)
UNMENDABLE = [
    (Item, "read", "torch.Tensor.__float__"),
    (ItemCall, "read", "torch.Tensor.item"),
    (Branch, "read", "torch.Tensor.__bool__"),
    (ToList, "read", "torch.Tensor.tolist"),
    (ToHost, "read", "torch.Tensor.cpu"),
    (ToHostNamed, "read", "torch.Tensor.to"),
    (NonZero, "shape", "torch.Tensor.nonzero"),
    (Masked, "shape", "torch.Tensor.__getitem__"),
    (MaskedWrite, "shape", "torch.Tensor.__setitem__"),
    (Repeats, "shape", "torch.repeat_interleave"),
    (Experts, "shape", "torch.Tensor.unique"),
    (Dropout, "random", "torch.nn.functional.dropout"),
    (HostRandom, "random", "torch.rand"),
    (CountsIn, "changes", "torch.Tensor.mul"),
    (NewTable, "changes", "torch.Tensor.to"),
]
# Without a line: what is wrong is seen after the forward.
UNMENDABLE_LATER = [
    (WritesArgument, "argument", "tensor 0 of the arguments, [3, 8] torch.float32"),
    (Counts, "state", "in each call, calls was changed"),
    (Opaque, "output", "a set in the output"),
]
MENDABLE = [
    (HostMask, "torch.Tensor.to"),
    (HostTable, "torch.Tensor.to"),
    (HostList, "torch.tensor"),
    (HostIndex, "torch.Tensor.__getitem__"),
    (HostListIndex, "torch.Tensor.__getitem__"),
    (HostArrayIndex, "torch.Tensor.__getitem__"),
    (HostWrite, "torch.Tensor.__setitem__"),
    (HostNumber, "torch.Tensor.mul"),
]


def fault_of(module: type[nn.Module]) -> tuple[str, int]:
    """File and line of the fault."""
    lines, first = inspect.getsourcelines(module)
    (line,) = [first + number for number, line in enumerate(lines) if line.rstrip().endswith("# fault")]
    return inspect.getsourcefile(module), line
