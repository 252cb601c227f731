"""Arrays of the host to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["upload"]

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float64: np.float64}


def upload(values: np.ndarray | Sequence[int], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on the device, in the order of the current stream.

    From ordinary memory (``torch.tensor(..., device="cuda")``) the host would wait there for all work queued so far.
    torch keeps the page-locked memory in between until the copy has been made.

    Args:
        values: of any shape. On the CPU the tensor may share an array's memory.
        dtype: int32, int64 or float64; None for an array's own.
    """
    array = np.ascontiguousarray(values, None if dtype is None else _NUMPY[dtype])
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
