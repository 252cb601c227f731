"""The nodes of a captured graph, through CUDA's driver API: what they hold, and how they are made to hold other words.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GRAPH.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from typing import Any

from ..errors import DriverError

try:
    from cuda.bindings import driver as _cu
except ImportError:  # there is no graph then, either
    _cu = None

# Of cuLaunchKernel: CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END.
_BUFFER, _BUFFER_SIZE, _END = 1, 2, 0

__all__ = ["CopyNode", "KernelNode", "Node", "Unknown", "call", "executable_of", "nodes_of"]


class Unknown(Exception):
    """It cannot be told what the nodes of a graph read; the text says why."""


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver API and return its value, or a tuple of its values.

    Raises:
        DriverError: it fails, or the driver lacks it.
    """
    try:
        result, *values = getattr(_cu, name)(*arguments)
    except (AttributeError, RuntimeError, ValueError) as error:
        # cuda-bindings, or libcuda, is older than the function; or cuda-bindings than a value of an enumeration.
        raise DriverError(name, str(error)) from error
    if result != _cu.CUresult.CUDA_SUCCESS:
        raise DriverError(name, getattr(result, "name", str(result)))
    return values[0] if len(values) == 1 else tuple(values)


class Node:
    """A node that holds no address of an input, as far as anyone needs to know.

    Attributes:
        values: what it holds, little-endian. ``set`` sends it to an executable graph.
        kind: what two captures of the same work have in common.
        movable: offsets up to this one may be rewritten.
    """

    movable = 0

    def __init__(self, handle: Any, kind: Hashable, size_bytes: int = 0) -> None:
        self.handle, self.kind = handle, kind
        self.values = ctypes.create_string_buffer(max(1, size_bytes))

    def set(self, executable: Any) -> None:
        """Give an executable graph the values.

        "The modifications only affect future launches of hGraphExec. Already enqueued or running launches of hGraphExec
        are not affected by this call." (cuGraphExecKernelNodeSetParams; the same for copies)

        Raises:
            DriverError: CUDA refuses.
        """
        raise NotImplementedError


class KernelNode(Node):
    """A launch of a kernel; ``values`` are its parameters, each where the kernel has it."""

    def __init__(self, handle: Any) -> None:
        params = call("cuGraphKernelNodeGetParams", handle)
        whole = _whole(params.extra) if params.extra else None
        layout = [(0, len(whole))] if whole is not None else _layout(params)
        grid = params.gridDimX, params.gridDimY, params.gridDimZ
        block = params.blockDimX, params.blockDimY, params.blockDimZ
        function = int(params.func) or int(params.kern)
        kind = "kernel", function, grid, block, params.sharedMemBytes, tuple(layout)
        super().__init__(handle, kind, max((offset + size for offset, size in layout), default=0))
        self.movable = len(self.values)
        start = ctypes.addressof(self.values)
        if whole is not None:
            ctypes.memmove(start, whole, len(whole))
            self._size = ctypes.c_size_t(len(whole))
            places = [_BUFFER, start, _BUFFER_SIZE, ctypes.addressof(self._size), _END]
        elif layout and not params.kernelParams:
            raise Unknown("a kernel has parameters that CUDA does not show")
        else:
            given = (ctypes.c_void_p * len(layout)).from_address(params.kernelParams) if layout else ()
            for source, (offset, size) in zip(given, layout, strict=True):
                ctypes.memmove(start + offset, source, size)
            places = [start + offset for offset, _ in layout]
        self._places = (ctypes.c_void_p * max(1, len(places)))(*places)
        if whole is not None:
            params.extra = ctypes.addressof(self._places)
        else:
            params.kernelParams = ctypes.addressof(self._places)
        self._params = params

    def set(self, executable: Any) -> None:
        call("cuGraphExecKernelNodeSetParams", executable, self.handle, self._params)


class CopyNode(Node):
    """A copy of memory; ``values`` are the address that it reads, then the one that it writes."""

    def __init__(self, handle: Any) -> None:
        params = call("cuGraphMemcpyNodeGetParams", handle)
        extent = params.WidthInBytes, params.Height, params.Depth
        super().__init__(handle, ("copy", extent), 16)
        if params.Height <= 1 and params.Depth <= 1:  # others cannot be changed
            self.movable = 8
        self._words = (ctypes.c_uint64 * 2).from_buffer(self.values)
        self._words[0], self._words[1] = int(params.srcDevice), int(params.dstDevice)
        self._params, self._context = params, call("cuCtxGetCurrent")

    def set(self, executable: Any) -> None:
        self._params.srcDevice = _cu.CUdeviceptr(self._words[0])
        call("cuGraphExecMemcpyNodeSetParams", executable, self.handle, self._params, self._context)


def nodes_of(graph: int) -> list[Node]:
    """The nodes of a ``cudaGraph_t``, which has to outlive them.

    Raises:
        DriverError: CUDA, or cuda-bindings, is too old (12.4 has what this takes).
        Unknown: it has nodes of other types than kernels, copies, fills and events; or cuda-python is missing.
    """
    if _cu is None:
        raise Unknown("cuda-python is not installed: pip install cuda-python")
    graph = _cu.CUgraph(graph)
    _, count = call("cuGraphGetNodes", graph)
    handles, count = call("cuGraphGetNodes", graph, count) if count else ([], 0)
    return [_node(handle) for handle in handles[:count]]


def executable_of(handle: int) -> Any:
    """A ``cudaGraphExec_t`` as ``Node.set`` takes it. The types are the same in CUDA's two interfaces."""
    return _cu.CUgraphExec(handle)


def _node(handle: Any) -> Node:
    kind = call("cuGraphNodeGetType", handle)
    types = _cu.CUgraphNodeType
    if kind == types.CU_GRAPH_NODE_TYPE_KERNEL:
        return KernelNode(handle)
    if kind == types.CU_GRAPH_NODE_TYPE_MEMCPY:
        return CopyNode(handle)
    if kind == types.CU_GRAPH_NODE_TYPE_MEMSET:  # an input that it wrote to would have been found to be changed
        return Node(handle, "fill")
    if kind in (
        *(types.CU_GRAPH_NODE_TYPE_EMPTY, types.CU_GRAPH_NODE_TYPE_EVENT_RECORD),
        types.CU_GRAPH_NODE_TYPE_WAIT_EVENT,
    ):
        return Node(handle, str(kind))
    raise Unknown(f"it has a node of type {getattr(kind, 'name', kind)}")


def _whole(extra: int) -> bytes:
    """The parameters of a launch that gave them in one piece, as those of cuBLAS do.

    Raises:
        Unknown: they are given in another way than the driver's documentation of ``cuLaunchKernel`` has it.
    """
    words = (ctypes.c_void_p * 5).from_address(extra)
    given: dict[int | None, int | None] = {}
    for at in (0, 2):
        if words[at] in (None, _END):
            break
        given[words[at]] = words[at + 1]
    start, size = given.get(_BUFFER), given.get(_BUFFER_SIZE)
    if len(given) != 2 or not start or not size or words[4]:
        raise Unknown("a kernel was launched with its parameters in a form that is not known")
    return ctypes.string_at(start, ctypes.c_size_t.from_address(size).value)


def _layout(params: Any) -> list[tuple[int, int]]:
    """Offset and size of each parameter of a kernel, in bytes. The driver says where they end by an error."""
    by_function = bool(int(params.func))
    query = ("cuFuncGetParamInfo", params.func) if by_function else ("cuKernelGetParamInfo", params.kern)
    layout: list[tuple[int, int]] = []
    while True:
        try:
            offset, size = call(*query, len(layout))
        except DriverError as error:
            if error.result == "CUDA_ERROR_INVALID_VALUE":
                return layout
            raise
        layout.append((int(offset), int(size)))
