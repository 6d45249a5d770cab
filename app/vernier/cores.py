"""How many cores this process may use: by its affinity, and by the processor time of its control group.

A container that is limited to one processor (`docker run --cpus 1`, Kubernetes' `limits.cpu`) still sees every core of
its host in the affinity; only the control group knows of the limit.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

ROOT = Path("/")


def available_cores(root: Path = ROOT) -> int:
    """At least 1. A part of a core counts as a whole one.

    Args:
        root: where /proc and /sys lie.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = processor_limit(root)
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def processor_limit(root: Path = ROOT) -> float | None:
    """Seconds of processor time that the control group may use in a second; None without a limit."""
    limits = [limit for folder in _groups(root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _groups(root: Path) -> list[Path]:
    """Folders of the process's control group and of those around it. In a container its own one is often the root."""
    mounted = root / "sys/fs/cgroup"
    folders = [mounted, mounted / "cpu"]
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = {"": mounted, "cpu": mounted / "cpu", "cpu,cpuacct": mounted / "cpu"}.get(controllers)
        if base is None or ".." in path:  # a group outside of what the container can see
            continue
        own = base / path.strip("/")
        folders += [own, *(parent for parent in own.parents if base in parent.parents)]
    return folders


def _limit(folder: Path) -> float | None:
    """Of version 2 (`cpu.max`) or 1 of control groups; None where there is none or it cannot be read."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text("ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text("ascii")
            period = (folder / "cpu.cfs_period_us").read_text("ascii")
        limit = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None
    return limit if limit > 0 else None
