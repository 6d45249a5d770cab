"""`--precision auto`: which precisions are worth building for a runtime, and why one of them was chosen.

Pure functions of what is known; the building, judging and measuring is the pipeline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vernier.builder.searching.latency import NOTICEABLE, Curve, relative_time
from vernier.package.manifest import PRECISIONS

#: The first compute capability whose tensor cores take the type; what is not here runs on every GPU from 7.5 on.
_NEEDS = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}
_FIRST_GPU = (7, 5)
_CPU = {
    "tf32": "TF32 is a mode of NVIDIA GPUs; a CPU computes it as FP32",
    "bf16": "ONNX Runtime has no BF16 kernels for a CPU",
    "fp8": "ONNX Runtime has no FP8 kernels for a CPU",
}


@dataclass(frozen=True)
class Standing:
    """How one precision fared.

    status: `pass`, `emulated`, `refused`, `skipped` or `failed`.
    curve: bucket → milliseconds on the runtime; empty where it was not measured.
    reason: why it was refused or skipped.
    """

    precision: str
    status: str
    curve: Curve
    reason: str = ""


def worth_building(runtime: str, capabilities: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Precisions that the hardware runs, the safest first, and for the others why it does not.

    Args:
        runtime: `onnxruntime` stands for a CPU.
        capabilities: compute capabilities such as `8.9` of the GPUs that will serve; every one must run a
            candidate. Empty: unknown, so everything that some GPU runs is a candidate.
    """
    if runtime == "onnxruntime":
        return [p for p in PRECISIONS if p not in _CPU], dict(_CPU)
    refused = {}
    for precision, least in _NEEDS.items():
        below = [c for c in capabilities if not runs_on_gpu(precision, c)]
        if below:
            needs = f"{least[0]}.{least[1]}"
            refused[precision] = (
                f"GPUs of compute capability {below[0]} have no {precision.upper()}; it needs {needs}"
            )
    return [p for p in PRECISIONS if p not in refused], refused


def runs_on_gpu(precision: str, capability: str) -> bool:
    """Whether a GPU of this compute capability, such as `8.9`, runs `precision`."""
    major, _, minor = capability.partition(".")
    return (int(major), int(minor or 0)) >= _NEEDS.get(precision, _FIRST_GPU)


def explain(chosen: str, standings: Sequence[Standing], where: str) -> dict[str, str]:
    """Precision → one sentence why it is served, or why it is not.

    Args:
        chosen: the fastest inside its budget, as `latency.fastest` found it.
        standings: every precision that was considered, FP32 among them.
        where: the runtime, for the sentences.
    """
    by_name = {standing.precision: standing for standing in standings}
    winner, exact = by_name[chosen], by_name["fp32"]
    return {s.precision: _sentence(s, winner, exact, where) for s in standings}


def _sentence(standing: Standing, winner: Standing, exact: Standing, where: str) -> str:
    if standing.status in ("skipped", "failed"):
        return f"not built: {standing.reason}"
    if standing.status == "emulated":
        return f"emulated, until a GPU has run it: {standing.reason}"
    if standing.status != "pass":
        return f"refused: {standing.reason}"
    if standing is winner:
        return _why_chosen(winner, exact, where)
    if not standing.curve:
        return f"inside the budget, but {where} cannot run it here, so it was not measured"
    ratio = relative_time(standing.curve, winner.curve)
    if ratio <= 1 + NOTICEABLE:
        safer = PRECISIONS.index(standing.precision) > PRECISIONS.index(winner.precision)
        return (
            f"inside the budget and as fast as {winner.precision} within {NOTICEABLE:.0%}, "
            f"{'which is the safer of the two' if safer else 'but no faster on the whole'}"
        )
    return f"inside the budget, but it takes {ratio:.2f} times as long as {winner.precision}"


def _why_chosen(winner: Standing, exact: Standing, where: str) -> str:
    if winner is exact:
        return "chosen: no variant inside the budget is faster"
    ratio = relative_time(exact.curve, winner.curve)
    sizes = sorted(bucket for bucket in winner.curve if bucket in exact.curve)
    span = f"batch {sizes[0]}" if len(sizes) == 1 else f"batches of {sizes[0]} to {sizes[-1]}"
    return f"chosen: the fastest inside its budget, {ratio:.2f} times as fast as fp32 on {where} ({span})"
