"""What can go wrong, by who has to act.

``ConfigError``    the caller must change an argument or the machine's settings; nothing was touched.
``OutOfPages``     no physical memory within the limit; wait for a sequence to end, or raise the limit.
``OutOfSlots``     every slot is taken; wait for a sequence to end.
``QueueFull``      as many requests wait as may; send it again later.
``DriverError``    the virtual-memory driver refused a call; the operation was undone.
"""

from __future__ import annotations

__all__ = ["ConfigError", "DriverError", "OutOfPages", "OutOfSlots", "QueueFull", "VattnError"]


class VattnError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(VattnError, ValueError):
    """A wrong argument or setting: names the value and what would be accepted."""


class OutOfPages(VattnError, RuntimeError):
    """Physical memory ran out. The caller can wait, truncate, or raise the limit.

    Attributes:
        asked_bytes: physical memory the operation still needed.
        free_bytes: physical memory it could have had.
        limit_bytes: the cache's memory limit.
    """

    def __init__(self, message: str, *, asked_bytes: int = 0, free_bytes: int = 0, limit_bytes: int = 0) -> None:
        super().__init__(message)
        self.asked_bytes = asked_bytes
        self.free_bytes = free_bytes
        self.limit_bytes = limit_bytes


class OutOfSlots(VattnError, RuntimeError):
    """Every slot belongs to a sequence. The caller can wait for one to be released."""


class QueueFull(VattnError, RuntimeError):
    """As many requests wait as the engine's ``max_waiting`` allows. The caller can send it again later.

    Attributes:
        max_waiting: that limit.
    """

    def __init__(self, message: str, *, max_waiting: int) -> None:
        super().__init__(message)
        self.max_waiting = max_waiting


class DriverError(VattnError, RuntimeError):
    """A driver call failed.

    Attributes:
        call: name of the call, as ``cuMemMap`` or ``mmap``.
        result: the driver's own name for the failure, as ``CUDA_ERROR_INVALID_VALUE`` or ``EINVAL``.
        out_of_memory: whether the failure means that memory (or a table the system keeps for it) ran out.
    """

    def __init__(self, call: str, result: str, detail: str = "", *, out_of_memory: bool = False) -> None:
        super().__init__(f"{call} failed with {result}" + (f": {detail}" if detail else ""))
        self.call = call
        self.result = result
        self.out_of_memory = out_of_memory
