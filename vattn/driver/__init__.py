"""Drivers of virtual memory: of CUDA, of the operating system, and a simulated one.

All calls to a virtual-memory system are in this folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError, VattnError
from .base import Driver, Fence
from .cuda import CudaDriver, cuda_version, unavailable
from .host import HostDriver
from .ledger import LedgerDriver
from .ruled import RuledDriver

__all__ = [
    "CudaDriver",
    "Driver",
    "DriverStatus",
    "Fence",
    "HostDriver",
    "LedgerDriver",
    "cuda_version",
    "open_driver",
    "probe",
]


def open_driver(device: str | torch.device) -> Driver:
    """Open the driver of a device.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.

    Raises:
        ConfigError: the device does not exist, or it cannot be used here. The message says why.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"vattn runs on Linux only, not on {sys.platform}")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f'device must be "cpu", "cuda" or "cuda:i", not {device!r}') from error
    if resolved.type == "cpu" and not resolved.index:
        return HostDriver()
    if resolved.type == "cuda":
        return CudaDriver(resolved)
    raise ConfigError(f'device must be "cpu", "cuda" or "cuda:i", not {device!r}')


@dataclass(frozen=True, slots=True)
class DriverStatus:
    """What ``vattn info`` prints about a driver.

    Attributes:
        name: ``"cuda"`` or ``"host"``.
        available: whether it can be opened here.
        reason: why it cannot; None where it can.
        granularity_bytes: every size and every address is a multiple of this.
        device: the device that it would use, as ``"cuda:0"``.
        detail: further facts, by name.
    """

    name: str
    available: bool
    reason: str | None = None
    granularity_bytes: int | None = None
    device: str | None = None
    detail: dict[str, str] = field(default_factory=dict)


def probe() -> list[DriverStatus]:
    """The status of the CUDA driver and of the host driver on this machine."""
    return [_probe_cuda(), _probe_host()]


def _probe_host() -> DriverStatus:
    try:
        driver = open_driver("cpu")
    except VattnError as error:
        return DriverStatus("host", False, str(error))
    try:
        available, total = driver.memory_info()
    except VattnError as error:
        return DriverStatus("host", False, str(error))
    finally:
        driver.close()
    detail = {"available_bytes": str(available), "total_bytes": str(total), "native": _native(driver)}
    return DriverStatus("host", True, None, driver.granularity_bytes, "cpu", detail)


def _probe_cuda() -> DriverStatus:
    if reason := unavailable():
        return DriverStatus("cuda", False, reason)
    try:
        driver = CudaDriver(torch.device("cuda"))
        free, total = driver.memory_info()
    except (RuntimeError, VattnError) as error:
        return DriverStatus("cuda", False, str(error))
    detail = {
        "name": torch.cuda.get_device_name(driver.device),
        "available_bytes": str(free),
        "total_bytes": str(total),
        "num_devices": str(torch.cuda.device_count()),
        "native": _native(driver),
    }
    return DriverStatus("cuda", True, None, driver.granularity_bytes, str(driver.device), detail)


def _native(driver: Driver) -> str:
    assert isinstance(driver, RuledDriver)
    return f"library not used ({driver.why_not_native})" if driver.why_not_native else "library used"
