"""What is asked of the servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        workload: json, binary or large; see benchmarks.peers.workloads.
        connections: of the closed loop.
    """

    name: str
    workload: str
    connections: int
    title: str


CASES = {
    case.name: case
    for case in (
        Case("json-96", "json", 96, "Small JSON, 96 connections"),
        Case("json-384", "json", 384, "Small JSON, 384 connections"),
        Case("json-1", "json", 1, "Small JSON, one connection alone"),
        Case("binary-96", "binary", 96, "Small binary, 96 connections"),
        Case("large-64", "large", 64, "600 KB binary, 64 connections"),
    )
}
#: What is asked at every number of cores.
GROWTH = "json-96"
#: What is asked of one core, where a service of several processes must not lose.
ON_ONE_CORE = (GROWTH, "large-64")


def sizes_up_to(cores: int) -> list[int]:
    """Numbers of cores that are measured: `cores` and the powers of two below, ascending."""
    below = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    return [*below, cores]


def cases_at(size: int, largest: int) -> list[Case]:
    """Everything at the largest number of cores, and what shows the growth at the others."""
    if size == largest:
        return list(CASES.values())
    return [CASES[name] for name in (ON_ONE_CORE if size == 1 else (GROWTH,))]
