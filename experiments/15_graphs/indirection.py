"""What copies of inputs cost, and what it costs to have a graph read them where they are, by the size of the input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from common import Records, time_us
from torch import nn

from vattn.graphs import make_capturable
from vattn.graphs.choosing import WAYS

SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20]  # bytes
QUICK_SIZES = [4 << 10, 64 << 10]
TURNS, CALLS, WARM_UP = 5, 20, 3
# So many tensors take turns as the input: a call never finds it where the call before did.
TENSORS = 3


# Kernels that read the whole input, or a part of it, and kernels that do not read it.
CASES = {"1": (1, None, 0), "8": (8, None, 0), "1-of-60": (1, 1024, 59)}


class Reads(nn.Module):
    """So many kernels read the input, or its first ``part`` elements, and write a number each; ``others`` follow."""

    def __init__(self, kernels: int, part: int | None, others: int) -> None:
        super().__init__()
        self.kernels, self.part, self.others = kernels, part, others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = [torch.linalg.vector_norm(x[: self.part], order + 1) for order in range(self.kernels)]
        found = torch.stack(numbers)
        for _ in range(self.others):
            found = found.sin()
        return found


def indirection(records: Records, quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kernels, shape in CASES.items():
        for size in QUICK_SIZES if quick else SIZES:
            case = f"indirection bytes={size} kernels={kernels}"
            with records.going_on(case):
                one(records, case, Reads(*shape), [torch.randn(size // 4, device=device) for _ in range(TENSORS)])


@torch.inference_mode()
def one(records: Records, case: str, module: nn.Module, tensors: list[torch.Tensor]) -> None:
    """Times of the module itself, and of each way of calling it by a graph: without a GPU there is none."""
    calls: dict[str, Callable[[torch.Tensor], object]] = {"eager": module}
    for way in WAYS[1:]:
        made = make_capturable(module, (tensors[0],), choice=way)
        for signature in made.report.signatures:
            calls[way] = made
            if way == "indirect":
                assert signature.choice == way, signature
                records.add(case, way, "not_copied", "bytes", [signature.moved_bytes])
                records.add(case, way, "updates", "nodes", [signature.num_updates])
    measured = make_capturable(module, (tensors[0],))
    for signature in measured.report.signatures:
        records.add(f"{case} choice={signature.choice}", "vattn", "choice", "1", [1])
    samples: dict[str, list[float]] = {way: [] for way in calls}
    given, draw = cycle(tensors), records.drawn(case)
    for _ in range(TURNS):
        for way in draw.sample(list(calls), len(calls)):
            samples[way] += timed(calls[way], given)[WARM_UP:]
    for way, found in samples.items():
        records.add(case, way, "call", "us", found)


def timed(call: Callable[[torch.Tensor], object], given: cycle[torch.Tensor]) -> list[float]:
    """Microseconds from each call until the GPU is done with it."""

    def once() -> None:
        call(next(given))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return time_us(once, WARM_UP + CALLS)
