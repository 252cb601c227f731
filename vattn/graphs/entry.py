"""One signature of a ``Capturable``: how its calls run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .graph import Graph
from .inputs import Inputs
from .report import Signature
from .state import same_bits

__all__ = ["Entry"]


@dataclass(eq=False)
class Entry:
    """How the calls of one signature run.

    Attributes:
        host: its tensors of the CPU, which the graph holds as they were.
        inputs: in words.
        graph: None where calls run eagerly.
        way: one of ``WAYS``.
        times: median microseconds of each way that was timed.
    """

    host: list[torch.Tensor]
    inputs: str
    graph: Graph | None
    way: str
    times: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Inputs, graph: Graph, way: str) -> Entry:
        words = [f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in example.tensors]
        host = [tensor.detach().clone() for tensor in example.on_host]
        return cls(host, ", ".join(words) or "no tensors", graph, way)

    def takes(self, called: Inputs) -> bool:
        """Whether a call's tensors of the CPU are the same; its key is."""
        return all(same_bits(*pair) for pair in zip(self.host, called.on_host, strict=True))

    def moved(self) -> frozenset[int]:
        """The inputs that a replay reads where the caller has them."""
        return self.graph.moved if self.graph is not None and self.way == "indirect" else frozenset()

    def settle(self, way: str) -> None:
        """Run this way from now on, and free what only others take."""
        self.way = way
        if way == "eager":
            self.graph = None
        elif self.graph is not None and way == "graph":
            self.graph.settle()

    def signature(self) -> Signature:
        way, moved, updates = self.way, 0, 0
        copied: tuple[str, ...] = ()
        if self.graph is not None and way == "indirect":
            moved, updates = self.graph.moved_bytes(), self.graph.num_updates()
            copied = tuple(f"{number}: {why}" for number, why in sorted(self.graph.refused.items()))
            way = way if self.graph.moved else "graph"
        return Signature(self.inputs, way, tuple(self.times.items()), moved, updates, copied)
