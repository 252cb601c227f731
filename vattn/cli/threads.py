"""How many threads the CPU path uses, and how they wait for each other.

Torch must not be imported by importing this: its OpenMP runtime reads the environment once, when it is loaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..machine import control_groups, read

__all__ = ["num_threads", "sleep_while_waiting", "use_all_cores"]

# How long a thread spins before it sleeps; the first is OpenMP's, the others are those of GNU's and LLVM's runtimes.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def sleep_while_waiting() -> None:
    """Let threads of a parallel region sleep, not spin, while they wait for the others.

    A decode step on the CPU is some hundred short regions. Where another process wants the same cores, a spinning
    thread keeps a core from the thread that it waits for: decoding may take twenty times as long. This has no effect
    once torch is loaded, and none where the user has set one of the variables.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def use_all_cores() -> int:
    """Set torch's thread count to ``num_threads()``, unless OMP_NUM_THREADS says otherwise; returns the count."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads())
    return torch.get_num_threads()


def num_threads(root: Path = Path("/")) -> int:
    """Cores in this process's affinity mask, at most its cgroup's CPU quota.

    A core gets one thread: two would share the arithmetic units that matrix products wait for. Threads beyond the quota
    are stopped for most of each period, while the others wait for them.

    Args:
        root: where ``/proc`` and ``/sys`` are looked for.
    """
    allowed = os.sched_getaffinity(0)
    cores = {read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in allowed}
    quota = _quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _quota(root: Path) -> float | None:
    """CPUs that the cgroup (version 2, else 1) grants, the tightest of its ancestors; None: no limit."""
    quotas: list[float] = []
    for group, is_v2 in control_groups("cpu", root):
        names = ("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        limit = " ".join(read(group / name) for name in names).split()
        if len(limit) == 2 and all(part.isdigit() for part in limit):  # not "max", not -1
            quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)
