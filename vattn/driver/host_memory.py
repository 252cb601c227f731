"""How much memory this process may still take: the machine's, or its control group's where that is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


def available_and_total_bytes() -> tuple[int, int]:
    """(available, total) bytes, the smaller of ``/proc/meminfo`` and every control group above this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    total = int(fields["MemTotal"].split()[0]) * 1024
    for limit, used in _cgroup_limits():
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return available, total


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of each control group that this process is in and that has a memory limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_file, used_file = _CGROUP_ROOT, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, used_file = _CGROUP_ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        # Inside a container the path may not exist below the mounted root; its parents, up to the root, may.
        for group in (folder, *folder.parents):
            limit, used = _read(group / limit_file), _read(group / used_file)
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit, max(used - _reclaimable(group), 0)
            if group == root:
                break


def _read(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(group: Path) -> int:
    """Page cache that the kernel drops before it refuses memory; counted in a group's usage all the same."""
    try:
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
