"""What the operating system lets this process have: its control groups, and its memory. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_and_total_bytes", "control_groups", "user_folder"]

_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """The folder of each control group that this process is in, from its own up, and whether it is of version 2.

    Args:
        controller: of the groups of version 1, ``"memory"`` or ``"cpu"``; version 2 has one tree for all.
        root: where ``/proc`` and ``/sys`` are looked for.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("" if is_v2 else controller)
        folder = mount / path.lstrip("/")
        # Inside a container the path may be the host's; the mount itself is the container's own group then.
        for group in (folder, *folder.parents):
            yield group, is_v2
            if group == mount:
                break


def user_folder(name: str) -> Path:
    """Where this user's own files of a kind are kept; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vattn" / name


def available_and_total_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """(available, total) bytes, the smaller of ``/proc/meminfo`` and every control group above this process.

    Raises:
        OSError: there is no ``/proc/meminfo``, or no file can be opened any more.
    """
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    total = int(fields["MemTotal"].split()[0]) * 1024
    for group, is_v2 in control_groups("memory", root):
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (read(group / name) for name in names)
        if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
            total = min(total, int(limit))
            in_use = max(int(used) - _reclaimable(group), 0)
            available = min(available, max(int(limit) - in_use, 0))
    return available, total


def _reclaimable(group: Path) -> int:
    """Page cache that the kernel drops before it refuses memory; counted in a group's usage all the same."""
    fields = dict(line.split() for line in read(group / "memory.stat").splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def read(path: Path) -> str:
    """A file's text without the space around it; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
