"""Which plan fits this machine, which ONNX file a runtime builds from, and what makes two plans the same.

A plan is a cache: always rebuildable from its variant. Whether one may be deserialized is decided
here, from what was written down about it, before a byte of it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Tuple

from vernier.errors import PlanMismatch
from vernier.package.manifest import Manifest, PlanEntry, VariantEntry

#: The key of `VariantEntry.lowerings` under which the graph for TensorRT below 10 lies.
BELOW_10 = "tensorrt<10"

_NEEDS_BELOW_10 = ("fp16", "int8-fp32", "int8")
_FROM_10 = ("bf16", "fp8")

#: The lowest compute capability on which hardware-compatible plans run.
_COMPATIBLE_FROM = (8, 0)

#: precision → the lowest compute capability that has the arithmetic.
_HARDWARE = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class Target:
    """The runtime and the GPU on which a plan would run.

    compute_capability: such as `9.0`.
    """

    runtime: str
    runtime_version: str
    compute_capability: str
    device_name: str

    @property
    def major(self) -> int:
        return version_parts(self.runtime_version)[0]

    @property
    def below_10(self) -> bool:
        """True for TensorRT 8 and 9, whose networks are not strongly typed."""
        return self.runtime == "tensorrt" and self.major < 10


def version_parts(version: str) -> Tuple[int, ...]:
    """`8.5.1.7` → (8, 5, 1, 7); a part that is no number ends it."""
    parts: List[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts) or (0,)


def plan_folder(runtime: str, runtime_version: str, compute_capability: str) -> str:
    """The folder of a plan in a package: `plans/tensorrt-10.9.0.34-sm89`."""
    sm = compute_capability.replace(".", "").replace(",", "+") or "any"
    return f"plans/{runtime}-{runtime_version}-sm{sm}"


def _fits_gpu(plan: PlanEntry, target: Target) -> Optional[str]:
    own = version_parts(target.compute_capability)
    if plan.hardware_compatible:
        if own >= _COMPATIBLE_FROM:
            return None
        return (
            f"is hardware-compatible from GPU architecture 8.0 on, but this GPU ({target.device_name}) "
            f"is {target.compute_capability}"
        )
    if target.compute_capability in plan.compute_capability.split(","):
        return None
    return (
        f"was built for GPU architecture {plan.compute_capability}, but this GPU "
        f"({target.device_name}) is {target.compute_capability}"
    )


def _fits_runtime(plan: PlanEntry, target: Target) -> Optional[str]:
    if target.runtime == "tensorrt-lean":
        if not plan.version_compatible or plan.runtime not in ("tensorrt", "tensorrt-lean"):
            return (
                f"was built for {plan.runtime} and is not version-compatible, which is all that "
                f"tensorrt-lean runs"
            )
        built, own = version_parts(plan.runtime_version), version_parts(target.runtime_version)
        if built[0] != own[0] or built > own:
            return (
                f"is version-compatible from TensorRT {plan.runtime_version} on within major version "
                f"{built[0]}, but this is {target.runtime_version}"
            )
        return None
    if plan.runtime != target.runtime:
        return f"was built for {plan.runtime}, but this is {target.runtime}"
    if plan.runtime_version != target.runtime_version:
        return f"was built by {plan.runtime} {plan.runtime_version}, but this is {target.runtime_version}"
    return None


def fit(plan: PlanEntry, target: Target, variant_sha256: str) -> Optional[str]:
    """None when `plan` may be loaded on `target`; else one sentence that says why not.

    Args:
        variant_sha256: hash of the ONNX file that the plan of this precision must come from now.
    """
    reason = _fits_runtime(plan, target) or _fits_gpu(plan, target)
    if reason is None and plan.variant_sha256 != variant_sha256:
        reason = (
            f"was built from another {plan.precision} variant "
            f"(sha256 {plan.variant_sha256[:12]}…, the package has {variant_sha256[:12]}…)"
        )
    return None if reason is None else f"plan '{plan.path}' {reason}"


def unsupported(precision: str, target: Target) -> Optional[str]:
    """None when this runtime and GPU can run the precision at all; else one sentence why not."""
    needed = _HARDWARE.get(precision)
    if needed and version_parts(target.compute_capability) < needed:
        return (
            f"{precision} needs GPU architecture {needed[0]}.{needed[1]} or newer; this GPU "
            f"({target.device_name}) is {target.compute_capability}"
        )
    if target.below_10 and precision in _FROM_10:
        return f"{precision} needs TensorRT 10 or newer; this is {target.runtime_version}"
    if target.runtime == "tensorrt-rtx" and target.compute_capability == "9.0":
        return "tensorrt-rtx does not support GPU architecture 9.0 (Hopper); use tensorrt"
    return None


def variant_files(variant: VariantEntry, target: Target) -> List[str]:
    """The ONNX file (first) and its external data from which a plan for `target` is built.

    Raises PlanMismatch when the package holds no graph that this runtime understands.
    """
    if not target.below_10:
        return variant.files
    lowered = variant.lowerings.get(BELOW_10)
    if lowered:
        return lowered
    if variant.precision in _NEEDS_BELOW_10:
        raise PlanMismatch(
            f"the package has no {variant.precision} graph for TensorRT {target.runtime_version}; "
            f"build it again with a release that writes the '{BELOW_10}' lowering"
        )
    return variant.files


def variant_sha256(manifest: Manifest, variant: VariantEntry, target: Target) -> str:
    """Hash of the ONNX file from which a plan for `target` is built. Raises PlanMismatch."""
    return manifest.files[variant_files(variant, target)[0]].sha256
