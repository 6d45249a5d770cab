"""What a benchmark tells of the machine that it ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


def cpu_ticks(cpu: str = "cpu") -> list[int]:
    """What all cores, or one (`cpu0`), did since the machine started, in ticks; see proc_stat(5)."""
    with open("/proc/stat", encoding="ascii") as file:
        return next([int(ticks) for ticks in line.split()[1:9]] for line in file if line.split()[0] == cpu)


def core_seconds(core: int) -> float:
    """What a core has worked since the machine started, in seconds of processor time."""
    user, nice, system, _, _, irq, softirq, _ = cpu_ticks(f"cpu{core}")
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def stolen_seconds() -> float:
    """What a hypervisor has given of all cores' time to other machines, in seconds."""
    return cpu_ticks()[7] / os.sysconf("SC_CLK_TCK")


def stolen(before: list[int], after: list[int]) -> float:
    """The share of the cores' time that a hypervisor gave to other machines meanwhile, 0 to 1."""
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return spent[7] / sum(spent) if sum(spent) else 0.0


def threads_per_core() -> int:
    """How many of the machine's processors share a core; 1 where the system does not say."""
    listed = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    if not listed.exists():
        return 1
    count = 0
    for part in listed.read_text("ascii").strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count
