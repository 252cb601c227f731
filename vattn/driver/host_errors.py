"""What the operating system's refusals mean, and what the user can change."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from pathlib import Path

from ..errors import DriverError


def failed(call: str, code: int | None = None) -> DriverError:
    """The error of a failed call. ``code`` is its errno; None: ask the C library."""
    code = ctypes.get_errno() if code is None else code
    out_of_memory = code in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)
    detail = os.strerror(code) + _what_to_change(code)
    return DriverError(call, errno.errorcode.get(code, str(code)), detail, out_of_memory=out_of_memory)


def _what_to_change(code: int) -> str:
    """What the user can change, where it is a limit of the process and not of the machine. Otherwise empty."""
    if code == errno.EMFILE:
        return f"; RLIMIT_NOFILE is {soft_limit(resource.RLIMIT_NOFILE)}: close files, or raise it (ulimit -n)"
    if code == errno.ENFILE:
        return "; close files, or raise the system's limit (sysctl fs.file-max)"
    if code == errno.EFBIG:
        return (
            f"; all pages are one file, and RLIMIT_FSIZE is {soft_limit(resource.RLIMIT_FSIZE)} bytes: raise it "
            "(ulimit -f) or lower memory_limit"
        )
    if code == errno.ENOMEM and (limit := soft_limit(resource.RLIMIT_AS)) is not None:
        return f"; RLIMIT_AS is {limit} bytes: raise it (ulimit -v)"
    if code in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        return "; a sandbox forbids it: let its profile (seccomp) allow memfd_create, fallocate, mmap and madvise"
    return ""


def soft_limit(which: int) -> int | None:
    """The process's soft limit. None: unlimited."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def refused(call: str, error: OSError) -> DriverError:
    return failed(call, error.errno or 0)


def too_many_mappings(call: str) -> DriverError:
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:  # no more files may be opened either, say
        allowed, advice = "", "sysctl vm.max_map_count"
    else:
        allowed, advice = f" ({limit})", f"sysctl -w vm.max_map_count={2 * limit}"
    detail = (
        f"the process has as many mappings as vm.max_map_count allows{allowed}; "
        f"raise it ({advice}) or use a larger page_bytes{_what_to_change(errno.ENOMEM)}"
    )
    return DriverError(call, "ENOMEM", detail, out_of_memory=True)
