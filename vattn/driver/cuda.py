"""CUDA virtual memory management through cuda-python, with the standard NVIDIA driver.

This module can be imported without CUDA. Then ``unavailable()`` says why the driver cannot be opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from ..errors import ConfigError, DriverError
from . import native
from .base import Fence
from .ruled import RuledDriver

try:
    from cuda.bindings import driver as _cu
except ImportError:  # pragma: no cover - the dependency is declared; this keeps the message below reachable
    _cu = None

# Of the native library, in the form that they have had since CUDA 10.2.
_FUNCTIONS = (b"cuMemCreate", b"cuMemMap", b"cuMemSetAccess")
_CUDA_VERSION = 12000


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why CUDA cannot be used here, as a text for the user. None: it can. Looked up once per process."""
    if _cu is None:
        return "cuda-python is not installed: pip install cuda-python"
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    try:
        (result,) = _cu.cuInit(0)
    except RuntimeError as error:  # cuda-python raises where libcuda is absent
        return f"no NVIDIA driver: {error}"
    if result != _cu.CUresult.CUDA_SUCCESS:
        return f"cuInit failed with {result.name}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


@lru_cache(maxsize=1)
def cuda_version() -> str | None:
    """The newest CUDA that the installed driver knows, as ``"13.0"``; None where there is no driver."""
    if unavailable():
        return None
    version = int(_call("cuDriverGetVersion"))
    return f"{version // 1000}.{version % 1000 // 10}"


@contextmanager
def _outside_capture() -> Iterator[None]:
    """Allow this thread to query events while another thread captures a graph.

    Without this, the query would invalidate that capture.
    """
    mode = _call("cuThreadExchangeStreamCaptureMode", _cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        yield
    finally:
        _call("cuThreadExchangeStreamCaptureMode", mode)


def _stream_id(stream: torch.cuda.Stream) -> int:
    """A number that no other stream of the process ever has. A handle may be used again after its stream's end.

    Must not be called for a stream that is being captured: it would invalidate the capture.
    """
    return int(_call("cuStreamGetId", stream.cuda_stream))


class CudaFence:
    """A CUDA event, recorded after the work submitted to a stream so far."""

    __slots__ = ("_event", "stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = _stream_id(stream)
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def done(self) -> bool:
        with _outside_capture():
            return self._event.query()

    def wait(self) -> None:
        with _outside_capture():
            self._event.synchronize()

    def order(self, stream: torch.cuda.Stream) -> None:
        """Make ``stream`` wait for the fence. Nothing to do where it is the fence's own stream."""
        if _stream_id(stream) != self.stream:
            stream.wait_event(self._event)


class CudaDriver(RuledDriver):
    """Virtual memory of one CUDA device, in its primary context, which PyTorch uses too."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        if reason := unavailable():
            raise ConfigError(f'device "{device}" is not available: {reason} (device="cpu" runs without a GPU)')
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if device.index is None else device.index
        if not 0 <= index < count:
            raise ConfigError(f'device "{device}" does not exist: this machine has cuda:0 to cuda:{count - 1}')
        torch.cuda.init()
        torch.cuda.mem_get_info(index)  # makes the primary context
        self.device = torch.device("cuda", index)
        attribute = _cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not _call("cuDeviceGetAttribute", attribute, _call("cuDeviceGet", index)):
            raise ConfigError(f'device "{self.device}" does not support CUDA virtual memory management')
        self._properties = _cu.CUmemAllocationProp()
        self._properties.type = _cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = _cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = index
        attribute = _cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        self._exportable = bool(_call("cuDeviceGetAttribute", attribute, _call("cuDeviceGet", index)))
        self._file_descriptor = _cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        if self._exportable:  # only what asks for it when it is created can be exported later
            self._properties.requestedHandleTypes = self._file_descriptor
        self._read_write = self._access_of(_cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        self._read_only = self._access_of(_cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ)
        minimum = _cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity_bytes = int(_call("cuMemGetAllocationGranularity", self._properties, minimum))
        self.default_page_bytes = self.granularity_bytes
        self._batches: native.CudaBatches | None = None
        self.why_not_native = native.why_not() or self._open_batches()
        super().__init__()

    def _access_of(self, flags: Any) -> list[Any]:
        access = _cu.CUmemAccessDesc()
        access.location = self._properties.location
        access.flags = flags
        return [access]

    def _open_batches(self) -> str | None:
        """Let the native library make batches of calls. Returns why it cannot; None: it does."""
        functions = [int(_call("cuGetProcAddress", name, _CUDA_VERSION, 0) or 0) for name in _FUNCTIONS]
        if not all(functions):
            return "the NVIDIA driver does not say where its functions are"
        self._batches = native.CudaBatches(functions, self._properties.getPtr(), self._read_write[0].getPtr())
        return None

    # -- address ranges ------------------------------------------------------------------------------------------
    def _reserve(self, size_bytes: int) -> int:
        return int(_call("cuMemAddressReserve", size_bytes, 0, 0, 0))

    def _free_range(self, address: int, size_bytes: int) -> None:
        _call("cuMemAddressFree", address, size_bytes)

    # -- handles -------------------------------------------------------------------------------------------------
    def _create(self, size_bytes: int) -> int:
        # New handles read as zeros on every driver that we measured, also memory that this process has freed before.
        # The conformance suite checks it.
        return int(_call("cuMemCreate", size_bytes, self._properties, 0))

    def _create_batch(self, size_bytes: int, count: int) -> tuple[list[int], BaseException | None]:
        if self._batches is None or self._has_replaced(CudaDriver._create):
            return super()._create_batch(size_bytes, count)
        return self._create_natively(self._batches, size_bytes, count)

    def _create_natively(
        self, batches: native.CudaBatches, size_bytes: int, count: int
    ) -> tuple[list[int], BaseException | None]:
        handles: list[int] = []
        _, failure = batches.create(size_bytes, count, handles)
        return handles, _error(*failure) if failure else None

    def _release(self, handle: int, size_bytes: int, still_mapped: bool) -> None:
        _call("cuMemRelease", handle)

    def _export(self, handle: int, size_bytes: int) -> int:
        if not self._exportable:
            raise DriverError("export_handle", "NOT_SUPPORTED", f"{self.device} cannot export memory")
        return int(_call("cuMemExportToShareableHandle", handle, self._file_descriptor, 0))

    def _import(self, fd: int, size_bytes: int) -> int:
        handle = int(_call("cuMemImportFromShareableHandle", fd, self._file_descriptor))
        if handle in self.book.handles:  # the driver counts how often it gave a handle; the books do not
            _call("cuMemRelease", handle)
            raise DriverError("import_handle", "INVALID_VALUE", f"this driver has that memory as handle {handle:#x}")
        return handle

    # -- mappings ------------------------------------------------------------------------------------------------
    def _map(self, address: int, size_bytes: int, handle: int) -> None:
        _call("cuMemMap", address, size_bytes, 0, handle, 0)

    def _map_batch(
        self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, BaseException | None]:
        if self._batches is None or self._has_replaced(CudaDriver._map, CudaDriver._set_access):
            return super()._map_batch(size_bytes, addresses, handles)
        return self._map_natively(self._batches, size_bytes, addresses, handles)

    def _map_natively(
        self, batches: native.CudaBatches, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, BaseException | None]:
        num_calls, failure = batches.map(size_bytes, addresses, handles)
        return num_calls, _error(*failure) if failure else None

    def _set_access(self, address: int, size_bytes: int, writable: bool) -> None:
        _call("cuMemSetAccess", address, size_bytes, self._read_write if writable else self._read_only, 1)

    def _unmap(self, address: int, size_bytes: int) -> None:
        _call("cuMemUnmap", address, size_bytes)

    # -- data ----------------------------------------------------------------------------------------------------
    def _zero(self, address: int, size_bytes: int) -> None:
        with self._current_stream() as stream:
            _call("cuMemsetD8Async", address, 0, size_bytes, stream)

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        with self._current_stream() as stream:
            _call("cuMemcpyDtoDAsync", target, source, size_bytes, stream)

    @contextmanager
    def _current_stream(self) -> Iterator[int]:
        """The handle of the device's current stream. Inside the block this thread has the device's primary context."""
        with torch.cuda.device(self.device):
            yield torch.cuda.current_stream().cuda_stream

    # -- the rest of the interface -------------------------------------------------------------------------------
    def fence(self) -> Fence | None:
        return CudaFence(torch.cuda.current_stream(self.device))

    def order_after(self, fence: Fence) -> None:
        assert isinstance(fence, CudaFence)
        fence.order(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        with _outside_capture():
            torch.cuda.synchronize(self.device)

    def is_capturing(self) -> bool:
        if torch.cuda.current_device() == self.device.index:  # asked at every growth, and a block takes longer
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def memory_info(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.device)

    def allocated_bytes(self) -> int | None:
        return None  # the device's counters include other processes and PyTorch's allocator

    def close(self) -> None:
        pass


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver API and return its value. Raises ``DriverError`` where it fails."""
    result, *values = getattr(_cu, name)(*arguments)
    if result != _cu.CUresult.CUDA_SUCCESS:
        raise _error(name, result)
    return values[0] if values else None


def _error(name: str, code: int) -> DriverError:
    """The error of a function that returned ``code``, a ``CUresult``."""
    try:
        result = _cu.CUresult(code).name
    except ValueError:  # of a driver that is newer than cuda-bindings
        result = str(code)
    return DriverError(name, result, out_of_memory=code == _cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
