"""A captured forward: where its inputs are written or read, and where its outputs then are."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from ..errors import DriverError
from ..interrupts import Uninterrupted
from .indirect import ALIGNMENT, Indirection, readers
from .inputs import Inputs
from .nodes import Unknown, executable_of, nodes_of
from .pointers import Span
from .trees import map_tensors

__all__ = ["Graph", "has_nan"]

_TIMED = 20


class Graph:
    """Replays a forward on inputs that are copied into its placeholders, or that it reads where they are.

    Attributes:
        outputs: of the last replay. The next one overwrites them.
        graph_bytes: device memory that it took.
        moved: the inputs that can be read where they are, by number.
        refused: why others are always copied.
        reserved: memory that callers may hold and replays overwrite. What lies in it is copied.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device, inputs: Inputs, outputs: Any) -> None:
        self.device, self.outputs = device, outputs
        self.graph_bytes = 0
        self.moved: frozenset[int] = frozenset()
        self.refused: dict[int, str] = {}
        self.reserved: list[Span] = []
        self._graph, self._placeholders = graph, inputs.on_device
        self._homes = [tensor.data_ptr() for tensor in inputs.on_device]
        self._strides = [tensor.stride() for tensor in inputs.on_device]
        self._indirection: Indirection | None = None

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def replay(self) -> None:
        self._graph.replay()

    def output_memory(self) -> list[Span]:
        """Where the outputs are."""
        spans: list[Span] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            spans.append(_memory(tensor))
            return tensor

        map_tensors(self.outputs, note)
        return spans

    # -- inputs ----------------------------------------------------------------------------------------------------
    def load(self, tensors: Sequence[torch.Tensor], moved: frozenset[int] = frozenset()) -> None:
        """Have the next replay take these. Those of ``moved`` it reads where they are, if it can; others are copied.

        What it reads where it is has to stay until the replay is done on the current stream, as in an eager call.
        """
        addresses = self._homes
        if moved:
            addresses = [
                tensor.data_ptr() if number in moved and self._readable(number, tensor) else home
                for number, (tensor, home) in enumerate(zip(tensors, self._homes, strict=True))
            ]
        if not self._point(addresses):
            addresses = self._homes
        for placeholder, tensor, address, home in zip(self._placeholders, tensors, addresses, self._homes, strict=True):
            if address == home:
                placeholder.copy_(tensor.detach())

    def _readable(self, number: int, tensor: torch.Tensor) -> bool:
        """Whether kernels that were chosen for the placeholder read a tensor as they should."""
        address = tensor.data_ptr()
        return (
            (address - self._homes[number]) % ALIGNMENT == 0
            and address != 0
            and tensor.stride() == self._strides[number]
            and not tensor.is_conj()
            and not tensor.is_neg()
            and not any(span.start <= address < span.start + span.nbytes for span in self.reserved)
        )

    def _point(self, addresses: Sequence[int]) -> bool:
        """Have later replays read there. Where CUDA refuses, they read the placeholders from now on."""
        if self._indirection is None:
            return addresses is self._homes
        try:
            self._indirection.point(addresses)
        except DriverError as error:
            # Some nodes may have been changed, so there is a new executable graph. The current stream has waited for
            # all replays of the old one.
            torch.cuda.current_stream(self.device).synchronize()
            with Uninterrupted():
                self._graph.instantiate()
                self._indirection, self.moved = None, frozenset()
            self.refused = dict.fromkeys(range(len(self._homes)), str(error))
            return False
        return True

    # -- which inputs can be moved ---------------------------------------------------------------------------------
    def find_readers(self, trial: torch.cuda.CUDAGraph, inputs: Inputs) -> None:
        """Set ``moved`` to the inputs whose every reader is known, by comparison with another capture.

        Args:
            trial: of the same forward, kept.
            inputs: its placeholders. All of them still hold their memory.
        """
        before, after = ([_memory(tensor) for tensor in held] for held in (inputs.on_device, self._placeholders))
        try:
            earlier, later = nodes_of(trial.raw_cuda_graph()), nodes_of(self._graph.raw_cuda_graph())
            words, self.refused = readers(earlier, later, before, after)
        except (DriverError, Unknown) as error:
            self.refused = dict.fromkeys(range(len(after)), str(error))
            return
        outputs = {span.start for span in self.output_memory()}
        for number, span in enumerate(after):
            if span.start in outputs and words.pop(number, None) is not None:
                self.refused[number] = "an output is a view of it"
        executable = executable_of(self._graph.raw_cuda_graph_exec())
        self._indirection = Indirection(executable, words, self._homes)
        self.moved = frozenset(words)

    def poison(self, others: Sequence[torch.Tensor], moved: frozenset[int]) -> None:
        """Spoil placeholders: with NaN, or with the values of others where any bits might be an index."""
        for number in moved:
            placeholder = self._placeholders[number]
            if has_nan(placeholder):
                memory = placeholder.untyped_storage()
                torch.empty(0, dtype=torch.uint8, device=self.device).set_(memory).fill_(255)
            else:
                placeholder.copy_(others[number])

    def dearer(self, tensors: Sequence[torch.Tensor]) -> dict[int, str]:
        """Which of ``moved`` take longer to move than to copy, and how much longer."""
        found: dict[int, str] = {}
        for number in sorted(self.moved):
            away = [*self._homes]
            away[number] = tensors[number].data_ptr()
            begin = perf_counter()
            for _ in range(_TIMED):
                if not (self._point(away) and self._point(self._homes)):
                    return {}
            update = (perf_counter() - begin) / (2 * _TIMED)
            torch.cuda.synchronize(self.device)
            begin = perf_counter()
            for _ in range(_TIMED):
                self._placeholders[number].copy_(tensors[number])
            torch.cuda.synchronize(self.device)
            copy = (perf_counter() - begin) / _TIMED
            if update > copy:
                found[number] = f"updating its nodes takes {update * 1e6:.0f} µs, a copy {copy * 1e6:.0f} µs"
        return found

    def always_copy(self, why: dict[int, str]) -> None:
        """Leave inputs out of ``moved``, for the reasons given by their numbers."""
        self.refused |= {number: reason for number, reason in why.items() if number in self.moved}
        self.moved -= why.keys()

    def settle(self) -> None:
        """Copy all inputs from now on."""
        self._point(self._homes)
        self._indirection, self.moved = None, frozenset()

    def num_updates(self) -> int:
        """How many nodes a call updates whose inputs have all moved."""
        return self._indirection.num_nodes(self.moved) if self._indirection is not None else 0

    def moved_bytes(self) -> int:
        return sum(self._placeholders[number].nbytes for number in self.moved)


def has_nan(tensor: torch.Tensor) -> bool:
    """Whether it is of a type that has NaN: bytes of ones are one in all of them."""
    return tensor.is_floating_point() or tensor.is_complex()


def _memory(tensor: torch.Tensor) -> Span:
    storage = tensor.untyped_storage()
    return Span(storage.data_ptr(), storage.nbytes())
