"""Several projections of the same input as one product: their weights side by side, the parameters views of that."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["adopt", "merge"]


def merge(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of the rows of all; a copy, unless they lie one after the other already.

    Args:
        parameters: ``[outputs_i, ...]`` each, contiguous.

    Returns:
        ``[sum of outputs_i, ...]``.
    """
    first, rows = parameters[0], sum(parameter.shape[0] for parameter in parameters)
    ends = [parameter.data_ptr() + parameter.nbytes for parameter in parameters]
    starts = [parameter.data_ptr() for parameter in parameters]
    with torch.inference_mode(False), torch.no_grad():
        if starts[1:] == ends[:-1] and len({p.untyped_storage().data_ptr() for p in parameters}) == 1:
            return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
        return torch.cat([parameter.data for parameter in parameters])


def adopt(parameters: Sequence[torch.Tensor], merged: torch.Tensor) -> None:
    """Make parameters views of what ``merge`` made of them, so that their own memory is given back."""
    with torch.inference_mode(False), torch.no_grad():
        parts = merged.split([parameter.shape[0] for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter.data_ptr() != part.data_ptr():
                parameter.data = part
