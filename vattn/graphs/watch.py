"""Watches one run of a forward: what it does on the device, what it brings there, and what a graph could not hold.

Two of PyTorch's documented modes see everything: ``TorchFunctionMode`` what the code calls, by the name that a person
knows, and ``TorchDispatchMode`` the operations that this leads to.

Without a GPU the watch pretends: arguments, parameters and buffers, what is made with ``device=`` (but for the string
``"cpu"``), and what is computed from any of these would be on the GPU; other tensors on the CPU. The address of a
storage tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from .compiled import as_written
from .constants import Constants
from .report import ADVICE, Finding, here
from .trees import tensors_in

__all__ = ["Uncapturable", "Watch"]

_aten = torch.ops.aten
_INDEX = (_aten.index.Tensor,)
_INDEX_PUT = (_aten.index_put_.default, _aten.index_put.default)
_COPY = (_aten._to_copy.default, _aten.copy_.default)
# Tensors made of Python's or NumPy's data: PyTorch copies them to the device out of a mode's sight.
_BUILDERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
_INDEXERS = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)  # they do so with lists of numbers
_READERS = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
_READ_TAGS = {torch.Tag.data_dependent_output, getattr(torch.Tag, "cudagraph_unsafe", torch.Tag.data_dependent_output)}

_NUMBER = "its value becomes part of the graph"


class Uncapturable(Exception):
    """Raised ahead of work that would break a capture."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


class Watch:
    """One run.

    Args:
        device: where the forward works; on ``cpu`` the watch pretends.
        constants: what is brought to the device is replaced by these copies.
        learn: new ones are added; otherwise what is not among them is a finding.
        expected: the trace of an earlier run; the first difference is a finding.
        guard: raise ``Uncapturable`` instead of noting what would break a capture. Also leaves random numbers alone.
        resident: tensors that would be on the GPU, where the watch pretends.
    """

    def __init__(
        self,
        device: torch.device,
        constants: Constants,
        *,
        learn: bool = False,
        expected: list[Any] | None = None,
        guard: bool = False,
        resident: Iterable[torch.Tensor] = (),
    ) -> None:
        self.findings: dict[tuple[str, str, str, int], Finding] = {}
        self.trace: list[Any] = []
        self._device = device
        self._pretends = device.type == "cpu"
        self._constants = constants
        self._learn = learn
        self._expected = expected
        self._guard = guard
        self._stream = None if self._pretends else torch.cuda.current_stream(device)
        self._called: Any = None  # the function that the code called
        self._places = False  # whether it said device=
        self._numbers: list[torch.Tensor] = []  # that PyTorch made of Python's within that function
        self._own_work = False
        self._addresses: set[int] = set()
        self._kept: list[torch.Tensor] = []  # so that no address is used twice
        for tensor in resident:
            self._reside(tensor)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with as_written(), _Operations(self), _Calls(self):
            yield

    # -- what the code calls ---------------------------------------------------------------------------------------
    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._own_work:
            return function(*args, **kwargs)
        outer = self._called, self._places
        self._called, self._places, self._numbers = function, kwargs.get("device") not in (None, "cpu"), []
        if self._pretends and isinstance(function, FunctionType):  # PyTorch's own Python says device= in its midst
            self._places = self._places or any(map(self._resides, tensors_in(args)))
        try:
            if function in _BUILDERS and self._lands_here(function, args, kwargs):
                return self._build(function, args, kwargs)
            if function in _INDEXERS and self._resides(args[0]):
                args = (args[0], self._index(args[1]), *args[2:])
            elif self._pretends and function in (*_READERS, torch.Tensor.to):
                return self._pretend_to_move(function, args, kwargs)
            return function(*args, **kwargs)
        finally:
            self._called, self._places = outer

    def _lands_here(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a builder makes a tensor of the device."""
        of, device = function is torch.Tensor.new_tensor, kwargs.get("device")
        if self._pretends:
            return self._places or (device is None and of and self._resides(args[0]))
        default = args[0].device if of else torch.get_default_device()
        return torch.device(default if device is None else device).type == self._device.type

    def _build(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data = [*args, *kwargs.values()][function is torch.Tensor.new_tensor]
        if isinstance(data, torch.Tensor) and self._resides(data):
            return function(*args, **kwargs)
        if any(self._resides(tensor) for tensor in tensors_in(data)):
            self._fault("read", self._name())
        self._places = False
        host = function(*args, **{**kwargs, "device": "cpu"})
        return self._brought(host, self._name()).clone()

    def _index(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        numbers = isinstance(index, (list, range)) and len(index) > 0 and all(type(number) is int for number in index)
        if numbers or (isinstance(index, np.ndarray) and index.dtype.kind in "iu"):
            with self._own():
                host = torch.tensor(index, dtype=torch.int64, device="cpu")
            return self._brought(host, self._name())
        return index

    def _pretend_to_move(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What does nothing where everything is on the CPU."""
        tensor, given = args[0], [*args[1:], *kwargs.values()]
        to_host = function in _READERS or any(isinstance(value, str) and value == "cpu" for value in given)
        to_device = any(
            isinstance(value, torch.device) or (isinstance(value, torch.Tensor) and self._resides(value))
            for value in given
        )
        if to_host and self._resides(tensor):
            self._fault("read", self._name())
            tensor = tensor.clone()
            self._addresses.discard(_address(tensor))
        elif to_device and not to_host and not self._resides(tensor):
            tensor = self._brought(tensor, self._name()).clone()
        return function(tensor, *args[1:], **kwargs)

    # -- what that leads to ----------------------------------------------------------------------------------------
    def operate(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = kwargs.get("device")
        lands = self._places if self._pretends else target is not None and target.type == self._device.type
        if self._own_work or not (lands or any(self._resides(tensor) for tensor in tensors_in([args, kwargs]))):
            result = self._run(function, args, kwargs)
            self._numbers += [tensor for tensor in tensors_in(result) if tensor.dim() == 0]
            return result
        where = self._name(function)
        to_host = function is _aten.copy_.default and not self._resides(args[0])
        if to_host or (function is _aten._to_copy.default and not self._pretends and not lands and target is not None):
            self._fault("read", where)
            return function(*args, **kwargs)
        if not self._pretends and lands and target is not None and target.index not in (None, self._device.index):
            self._fault("device", where)
        if not self._pretends and torch.cuda.current_stream(self._device) != self._stream:
            self._fault("stream", where)
        if kind := self._waits(function, args, kwargs):
            self._fault(kind, where)
        args = self._bring(function, args, where)
        self._note((str(function), *map(self._summary, (*args, *kwargs.items()))), where)
        result = self._run(function, args, kwargs)
        if self._pretends:
            for tensor in tensors_in(result):
                self._reside(tensor)
        return result

    def _waits(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The kind of finding of an operation whose result the host waits for, or whose shape."""
        if function in (*_INDEX, *_INDEX_PUT):
            if not self._resides(args[0]):
                return "read"
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if not masks or (function in _INDEX_PUT and self._fills(args[1], args[2])):
                return None
            return "shape"
        if function is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
            return None
        if torch.Tag.dynamic_output_shape in function.tags:
            return "shape"
        if _READ_TAGS & set(function.tags) or function is _aten._linalg_check_errors.default:
            return "read"
        return None

    def _bring(self, function: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
        """The arguments with tensors of the CPU replaced by copies on the device, where PyTorch would copy them.

        Elsewhere it takes only numbers as such tensors, and reads them when it launches: they become part of the graph.
        """
        brought: list[Any] = list(args)
        if function in (*_INDEX, *_INDEX_PUT):
            if function in _INDEX_PUT and not self._fills(args[1], args[2]):
                brought[2] = self._resident(args[2], where)
            brought[1] = [index if index is None else self._resident(index, where) for index in args[1]]
        elif function in _COPY:
            brought = [self._resident(a, where) if isinstance(a, torch.Tensor) else a for a in args]
        elif any(self._resides(tensor) for tensor in tensors_in(args)):
            for tensor in tensors_in(args):
                if not self._resides(tensor) and all(tensor is not made for made in self._numbers):
                    number = tensor.dim() == 0 or not self._pretends
                    self._add("host", where, mended=_NUMBER if number else "")
        return tuple(brought)

    def _resident(self, tensor: torch.Tensor, where: str) -> torch.Tensor:
        return tensor if self._resides(tensor) else self._brought(tensor, where)

    def _brought(self, host: torch.Tensor, where: str) -> torch.Tensor:
        """The device's copy of a tensor of the CPU; of a single number one that the device fills."""
        entry: tuple[Any, ...]
        with self._own():
            if host.numel() == 1:
                copy = torch.full(host.shape, host.item(), dtype=host.dtype, device=self._device)
                entry, mended = ("number", repr(host.item())), _NUMBER
            else:
                known = self._constants.find(host)
                if known is None:
                    if not self._learn:
                        self._fault("changes", where)
                    copy = host.clone() if self._pretends else host.to(self._device)
                    known = self._constants.add(host, copy)
                copy = self._constants.copies[known]
                entry, mended = ("constant", known), "its contents are kept on the device"
        if self._learn:
            self._add("host", where, mended=mended)
        if self._pretends:
            self._reside(copy)
        self._note(entry, where)
        return copy

    def _note(self, entry: tuple[Any, ...], where: str) -> None:
        """Add to the trace: everything that a graph fixes."""
        at = len(self.trace)
        self.trace.append(entry)
        if self._expected is not None and (at >= len(self._expected) or self._expected[at] != entry):
            self._expected = None  # one is enough
            self._fault("changes", where)

    def _summary(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if self._resides(value):
                return value.shape, value.dtype
            with self._own():
                return value.shape, value.dtype, repr(value.tolist())
        if isinstance(value, (list, tuple)):
            return tuple(self._summary(item) for item in value)
        return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else str(value)

    def _run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation; note it if it draws random numbers, which some draw only sometimes."""
        if self._guard or torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **kwargs)
        before = self._random_states()
        result = function(*args, **kwargs)
        if kwargs.get("generator") is not None or self._random_states() != before:
            self._fault("random", self._name(function))
        return result

    def _random_states(self) -> list[bytes]:
        with self._own():
            states = [torch.get_rng_state()] + ([] if self._pretends else [torch.cuda.get_rng_state(self._device)])
            return [state.numpy().tobytes() for state in states]

    @contextmanager
    def _own(self) -> Iterator[None]:
        """What runs in here is not the forward's."""
        outer, self._own_work = self._own_work, True
        try:
            yield
        finally:
            self._own_work = outer

    # -- findings --------------------------------------------------------------------------------------------------
    def _fault(self, kind: str, operation: str) -> None:
        finding = self._add(kind, operation)
        if self._guard:
            raise Uncapturable(finding)

    def _add(self, kind: str, operation: str, mended: str = "") -> Finding:
        file, line = here()
        key = kind, operation, file, line
        known = self.findings.get(key)
        found = Finding(
            kind, operation, file, line, mended or ADVICE[kind], bool(mended), known.count + 1 if known else 1
        )
        self.findings[key] = found
        return found

    def _name(self, function: Any = None) -> str:
        called = self._called if self._called is not None else function
        return resolve_name(called) or str(called)

    # -- where tensors are -----------------------------------------------------------------------------------------
    def _resides(self, tensor: torch.Tensor) -> bool:
        if self._pretends:
            return _address(tensor) in self._addresses
        return tensor.device.type == self._device.type

    def _fills(self, indices: list[torch.Tensor | None], value: torch.Tensor) -> bool:
        """Whether PyTorch turns an assignment under a mask into ``masked_fill``, which waits for nothing."""
        given = [index for index in indices if index is not None]
        one_mask = len(given) == 1 and given[0].dtype in (torch.bool, torch.uint8)
        return one_mask and value.numel() == 1 and not self._resides(value)

    def _reside(self, tensor: torch.Tensor) -> None:
        self._addresses.add(_address(tensor))
        self._kept.append(tensor)


class _Calls(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._watch.call(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._watch.operate(func, args, kwargs or {})


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
