"""The manifest of an engine package: what is in it, what it may be fed, what was proven about it.

The schema is versioned. A reader refuses a version it does not know; unknown fields are an error,
so that a typing mistake in a hand-edited manifest is found at load time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vernier.errors import PackageError
from vernier.tensors import DTYPES, Dim, TensorSpec

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

#: From the safest to the riskiest. Fallback walks towards the left.
PRECISIONS: Tuple[str, ...] = ("fp32", "tf32", "bf16", "fp16", "int8-fp32", "int8", "fp8")
RUNTIMES: Tuple[str, ...] = ("onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-lean")

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}$"


class Model(BaseModel):
    """Frozen, strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(Model):
    """One input or output in graph order; entries of `shape` are an int or a dimension's name."""

    name: str
    dtype: str
    shape: List[Union[int, str]]

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}")
        return value

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, tuple(self.shape))


class DimRange(Model):
    """The sizes that a named dimension may take; engines are tuned for `opt`."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> DimRange:
        if not self.min <= self.opt <= self.max:
            raise ValueError("a range must have min <= opt <= max")
        return self


class Batching(Model):
    """How requests are joined.

    kind: `dynamic`: `dim` is the named first dimension of every input and output.
        `fixed`: every input and output has the first size `size`; shorter batches are padded to it.
        `none`: tensors share no batch axis; every request runs alone.
    """

    kind: str = Field(pattern="^(dynamic|fixed|none)$")
    dim: Optional[str] = None
    size: Optional[int] = None
    buckets: List[int] = Field(default_factory=list)


class SequenceDim(Model):
    """A named dimension besides the batch that is padded to buckets so that requests can share a batch.

    pad_value: what inputs are padded with; `pad_values` has those that take another one, by name.
    crop_outputs: whether outputs that have the dimension are cut back to the request's own size.
    lengths_input, mask_input: the inputs that tell the model what is real; masks are padded with 0.
    """

    dim: str
    buckets: List[int] = Field(min_length=1)
    pad_value: float = 0.0
    pad_values: Dict[str, float] = Field(default_factory=dict)
    crop_outputs: bool = True
    lengths_input: Optional[str] = None
    mask_input: Optional[str] = None


class FileEntry(Model):
    """A file of the package; `path` is relative to the package, with forward slashes."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class GateResult(Model):
    """What the accuracy gate measured on one runtime.

    metrics: name → value on the evaluation data (see vernier.accuracy).
    budget: the terms that had to hold, as written, such as `auc>=99%`.
    """

    passed: bool
    budget: List[str]
    metrics: Dict[str, float]
    samples: int = Field(ge=1)
    reason: str = ""


class VariantEntry(Model):
    """One precision of the model.

    files: the ONNX file first, then its external data, as keys of `Manifest.files`.
    gates, latency_ms: keyed by runtime; latency by bucket (as text) in milliseconds, the median.
    assignment: how many nodes run in which type, for people.
    budget: metric → limit on the golden vectors and on live traffic, in `vernier.accuracy`'s metrics.
    """

    precision: str
    files: List[str] = Field(min_length=1)
    gates: Dict[str, GateResult] = Field(default_factory=dict)
    latency_ms: Dict[str, Dict[str, float]] = Field(default_factory=dict)
    assignment: Dict[str, int] = Field(default_factory=dict)
    budget: Dict[str, float] = Field(default_factory=dict)
    lowerings: Dict[str, List[str]] = Field(default_factory=dict)

    @field_validator("precision")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}")
        return value


class PlanEntry(Model):
    """A serialized engine: which variant, and the one runtime and GPU architecture that it fits.

    variant_sha256: hash of the ONNX file it was built from.
    compute_capability: such as `8.9`; empty with `hardware_compatible`.
    """

    path: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    precision: str
    runtime: str
    runtime_version: str
    compute_capability: str
    variant_sha256: str
    version_compatible: bool = False
    hardware_compatible: bool = False


class EvidenceWarning(Model):
    """What is doubtful about the data behind a package's gates.

    code: a stable name for programs, such as `few_samples`; docs/precision.md lists them.
    message: one sentence that says what to do.
    """

    code: str = Field(pattern="^[a-z_]+$")
    message: str


class CalibrationEntry(Model):
    """The files under which the calibration cache and its sidecar lie in the package."""

    cache: str
    sidecar: str


class Manifest(Model):
    """The whole file. `files` holds every file of the package but the manifest itself and the plans."""

    schema_version: int = SCHEMA_VERSION
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    created: str
    source_sha256: str
    calibration_sha256: Optional[str] = None
    evaluation_sha256: Optional[str] = None
    inputs: List[TensorEntry] = Field(min_length=1)
    outputs: List[TensorEntry] = Field(min_length=1)
    dims: Dict[str, DimRange] = Field(default_factory=dict)
    batching: Batching
    sequence: List[SequenceDim] = Field(default_factory=list)
    variants: Dict[str, VariantEntry]
    plans: List[PlanEntry] = Field(default_factory=list)
    calibration: Optional[CalibrationEntry] = None
    golden: Optional[str] = None
    files: Dict[str, FileEntry]
    decision: Dict[str, str] = Field(default_factory=dict)
    warnings: List[EvidenceWarning] = Field(default_factory=list)
    serve: Dict[str, Union[int, float, str, bool]] = Field(default_factory=dict)
    tools: Dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema version {self.schema_version} is unknown here (this release reads {SCHEMA_VERSION})"
            )
        if "fp32" not in self.variants:
            raise ValueError("the fp32 variant, the reference of all others, is missing")
        for name, variant in self.variants.items():
            if name != variant.precision:
                raise ValueError(f"variant '{name}' says that its precision is '{variant.precision}'")
            for path in variant.files + [p for paths in variant.lowerings.values() for p in paths]:
                if path not in self.files:
                    raise ValueError(f"variant '{name}' names '{path}', which `files` does not list")
        dims = {d for t in list(self.inputs) + list(self.outputs) for d in t.shape if isinstance(d, str)}
        for entry in self.inputs:
            for dim in entry.shape:
                if isinstance(dim, str) and dim not in self.dims:
                    raise ValueError(f"dimension '{dim}' of input '{entry.name}' has no range in `dims`")
        if self.batching.kind == "dynamic" and self.batching.dim not in dims:
            raise ValueError("batching.dim must name a dimension of the inputs")
        if self.batching.kind == "fixed" and not self.batching.size:
            raise ValueError("batching.size is missing")
        return self

    def input_specs(self) -> List[TensorSpec]:
        return [t.spec() for t in self.inputs]

    def output_specs(self) -> List[TensorSpec]:
        return [t.spec() for t in self.outputs]

    def input_dims(self) -> Dict[str, Tuple[int, int]]:
        """Name → (min, max) of every named dimension."""
        return {name: (r.min, r.max) for name, r in self.dims.items()}

    @property
    def batch_dim(self) -> Optional[Dim]:
        return self.batching.dim if self.batching.kind == "dynamic" else None

    @property
    def max_batch(self) -> int:
        """The most rows that one execution takes."""
        if self.batching.kind == "dynamic":
            return self.dims[str(self.batching.dim)].max
        return self.batching.size or 1 if self.batching.kind == "fixed" else 1


def parse_manifest(text: str, where: str) -> Manifest:
    """Reads a manifest; `where` is for messages. Raises PackageError with the first fault."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise PackageError(
            f"{where} is not a valid manifest: {field + ': ' if field else ''}{first['msg']}; "
            f"build the package again"
        ) from error


def read_manifest(package: Path) -> Manifest:
    """Reads `package`/manifest.json. Raises PackageError."""
    path = package / MANIFEST_NAME
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"cannot read {path}: {error}; build the package again") from error
    return parse_manifest(text, str(path))


def dump_manifest(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=2) + "\n"
