"""What a build is asked for and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from vernier.builder.command import BAD_INPUT, DONE, FAULT, REFUSED, fault_report
from vernier.builder.graphs.shapes import ShapeRange
from vernier.builder.plans.plan import PlanOptions
from vernier.errors import BuildError
from vernier.package.manifest import PRECISIONS, GateResult, Manifest

AUTO = "auto"
CALIBRATION_METHODS = ("minmax", "entropy", "percentile", "mse", "best")
DEFAULT_METHOD = "best"
DEFAULT_LABEL_KEY = "label"
QUANTIZERS = ("vernier", "modelopt")
#: Precisions with quantized nodes, which need calibration data or a calibration cache.
QUANTIZED = ("int8", "int8-fp32", "fp8")


@dataclass(frozen=True)
class BuildRequest:
    """The command line of a build.

    precisions: in the order asked for, FP32 first; `("auto",)` for a search.
    calibration, evaluation: data sources (see `vernier.builder.samples.sources`).
    group_key: the array of the data that is equal for samples which belong together.
    calibration_method: None takes the cache's method, without a cache `best`.
    resume: where the state of the calibration is kept, for a build that is interrupted to go on there; see
        `vernier.builder.resume`.
    plans: plans to build beside the variants, of every precision that is kept.
    search: whether a variant that misses its budget gives nodes back to higher precision.
    below_tensorrt_10: whether to add the graphs that TensorRT 8 needs, at the size of FP32 each.
    """

    model: Path
    name: str
    out: Path
    precisions: tuple[str, ...] = ("fp32",)
    calibration: str | None = None
    evaluation: str | None = None
    label_key: str = DEFAULT_LABEL_KEY
    group_key: str | None = None
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    max_batch: int | None = None
    sequence: Mapping[str, Sequence[int]] | None = None
    pad_values: Mapping[str, float] = field(default_factory=dict)
    budget: str | None = None
    strict: bool = False
    calibration_method: str | None = None
    calibration_cache: Path | None = None
    calibration_samples: int | None = None
    resume: Path | None = None
    quantizer: str = "vernier"
    search: bool = True
    plans: PlanOptions | None = None
    below_tensorrt_10: bool = False


@dataclass(frozen=True)
class VariantOutcome:
    """One precision.

    status: `pass` (in the package), `emulated` (in the package for GPUs, and none has run it yet), `refused` (by the
        gate), `skipped` (cannot be had here) or `failed` (was asked for and cannot be built); `reason` says why.
    refused: whether a gate refused it, be it the gate of the runtime at hand alone.
    fault: the traceback of a fault in Vernier, to be reported; else empty.
    latency_ms: bucket → median milliseconds on `runtime`.
    """

    precision: str
    status: str
    reason: str = ""
    bytes: int = 0
    gate: GateResult | None = None
    latency_ms: Mapping[int, float] = field(default_factory=dict)
    assignment: Mapping[str, int] = field(default_factory=dict)
    refused: bool = False
    fault: str = ""


@dataclass(frozen=True)
class BuildOutcome:
    """A published package and how each precision fared.

    exit_code: 0, or the worst of what befell a variant: 1 the gate refused one, 2 one that was asked for cannot be
        built, 3 one met a fault in Vernier.
    """

    package: Path
    manifest: Manifest
    runtime: str
    variants: tuple[VariantOutcome, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        if any(v.fault for v in self.variants):
            return FAULT
        if any(v.status == "failed" for v in self.variants):
            return BAD_INPUT
        return REFUSED if any(v.refused for v in self.variants) else DONE

    def as_json(self) -> dict[str, Any]:
        return {
            "package": str(self.package),
            "name": self.manifest.name,
            "version": self.manifest.version,
            "runtime": self.runtime,
            "decision": dict(self.manifest.decision),
            "variants": [
                {
                    "precision": v.precision,
                    "status": v.status,
                    "reason": v.reason,
                    "bytes": v.bytes,
                    "budget": v.gate.budget if v.gate else [],
                    "metrics": v.gate.metrics if v.gate else {},
                    "latency_ms": {str(bucket): ms for bucket, ms in v.latency_ms.items()},
                    "assignment": dict(v.assignment),
                    **({"fault": fault_report(v.fault)} if v.fault else {}),
                }
                for v in self.variants
            ],
            "warnings": [warning.model_dump() for warning in self.manifest.warnings],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }


def check_calibration_data(request: BuildRequest) -> None:
    """Raises BuildError when quantized precisions are asked for by name and there is nothing to calibrate on."""
    quantized = any(precision in QUANTIZED for precision in request.precisions)
    if quantized and not (request.calibration or request.calibration_cache):
        raise BuildError(
            "INT8 and FP8 need calibration data: give --calibration an .npz, a folder of .npy or module:function"
        )


def parse_precisions(text: str) -> tuple[str, ...]:
    """`fp32,fp16,int8` → the precisions, FP32 always among them and first; `auto` → `("auto",)`.

    Raises BuildError.
    """
    asked = [part.strip().lower() for part in text.split(",") if part.strip()]
    if AUTO in asked:
        if len(asked) > 1:
            raise BuildError("--precision auto chooses by itself: give either auto or a list")
        return (AUTO,)
    unknown = [part for part in asked if part not in PRECISIONS]
    if unknown or not asked:
        what = f"'{unknown[0]}' is no precision" if unknown else "--precision is empty"
        raise BuildError(f"{what}: choose from {', '.join(PRECISIONS)}, separated by commas, or auto")
    return tuple(dict.fromkeys(["fp32", *asked]))


def default_precisions(calibration: str | None, evaluation: str | None) -> tuple[str, ...]:
    """What the data at hand can prove."""
    if calibration is not None:
        return ("fp32", "fp16", "int8")
    return ("fp32", "fp16") if evaluation is not None else ("fp32",)


def parse_sequence(options: Sequence[str]) -> dict[str, list[int]] | None:
    """`frames`, `frames=64,128` or `none`, each once per dimension; no option at all gives None.

    Raises BuildError.
    """
    if not options:
        return None
    if list(options) == ["none"]:
        return {}
    found: dict[str, list[int]] = {}
    for option in options:
        name, _, sizes = option.partition("=")
        try:
            buckets = [int(size) for size in sizes.split(",")] if sizes else []
        except ValueError:
            buckets = [0]
        if not name or any(bucket < 1 for bucket in buckets):
            raise BuildError(f"--sequence {option} is not of the form frames=64,128,256 (or frames, or none)")
        found[name] = buckets
    return found


def parse_pad_values(options: Sequence[str]) -> dict[str, float]:
    """`ids=1` → `{"ids": 1.0}`. Raises BuildError."""
    found: dict[str, float] = {}
    for option in options:
        name, _, text = option.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            name = ""
        if not name or not isfinite(found[name]):
            raise BuildError(f"--pad-value {option} is not of the form ids=1: an input's name and a number")
    return found
