"""The facts of a build that `report.json` and `report.html` tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TermReport:
    """One term of the budget on one variant; see `vernier.budget.Finding`. `limit` is in the metric's own unit."""

    text: str
    value: float
    limit: float
    used: float
    passed: bool
    reference: float | None = None


@dataclass(frozen=True)
class VariantReport:
    """One precision.

    status: `pass`, `emulated` (in the package for GPUs, and none has run it yet), `refused`, `skipped` or `failed`;
    explanation: why it is served or not, in one sentence.
    terms: how it stands against the budget as a GPU computes it; served: on the runtime at hand.
    latency_ms: bucket → median milliseconds; empty where it was not measured.
    spread_ms: bucket → the quartiles, between which half of the runs lie.
    metrics: everything that was measured on the evaluation data.
    """

    precision: str
    status: str
    explanation: str
    bytes: int = 0
    terms: tuple[TermReport, ...] = ()
    served: tuple[TermReport, ...] = ()
    latency_ms: Mapping[int, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    assignment: Mapping[str, int] = field(default_factory=dict)
    kept_macs: float | None = None
    spread_ms: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def used(self) -> float | None:
        """The largest part of the budget that is used up; None where nothing was judged."""
        judged = [term.used for term in (*self.terms, *self.served)]
        return max(judged) if judged else None


@dataclass(frozen=True)
class LayerReport:
    """One quantizable node of one variant.

    sensitivity: the part of the budget that quantizing this node alone uses up; None where not measured.
    macs: share of all multiply-accumulates, 0 to 1.
    """

    name: str
    op_type: str
    precision: str
    macs: float
    sensitivity: float | None = None
    rounding: str = ""


@dataclass(frozen=True)
class SampleReport:
    """One of the samples that moved farthest.

    moved: its error in units of the distance between FP32's answers (`rel_spread`).
    index: in the data that judges.
    values: output → the most moved values as (index in the output's own dimensions, FP32, variant).
    """

    index: int
    moved: float
    values: Mapping[str, Sequence[tuple[int | tuple[int, ...], float, float]]]
    label: str = ""


@dataclass(frozen=True)
class StepReport:
    """One evaluation of a search; see `vernier.builder.searching.trials.Step`."""

    given_back: int
    used: float
    samples: str


@dataclass(frozen=True)
class SearchReport:
    """How one variant was brought into its budget."""

    steps: tuple[StepReport, ...]
    given_back: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class RangeReport:
    """One activation: the largest magnitude seen, where INT8 clips, and which method chose that."""

    tensor: str
    peak: float
    clip: float
    method: str


@dataclass(frozen=True)
class PlainReport:
    """What plain min-max INT8 of every node would have come to; see `vernier.builder.reports.plain`.

    used: the part of the budget that it uses up; term, value: where most.
    """

    used: float
    passed: bool
    term: str
    value: float
    nodes: int


@dataclass(frozen=True)
class WarningReport:
    """What is doubtful about the evidence; see `vernier.package.manifest.EvidenceWarning`."""

    code: str
    message: str


@dataclass(frozen=True)
class BuildReport:
    """Everything the report tells.

    decision: plain sentences, the first of which says what is served.
    independent: how many of the evaluated samples are independent of one another; None stands for all.
    layers, samples, searches: by precision.
    facts: what was built from what, as label → text.
    """

    name: str
    runtime: str
    chosen: str
    budget: tuple[str, ...]
    evaluated: int
    decision: tuple[str, ...]
    variants: tuple[VariantReport, ...]
    layers: Mapping[str, Sequence[LayerReport]] = field(default_factory=dict)
    samples: Mapping[str, Sequence[SampleReport]] = field(default_factory=dict)
    searches: Mapping[str, SearchReport] = field(default_factory=dict)
    ranges: tuple[RangeReport, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    independent: int | None = None
    warnings: tuple[WarningReport, ...] = ()
    plain: PlainReport | None = None


def as_json(report: BuildReport) -> dict[str, Any]:
    """Plain dicts and lists; numbers that JSON lacks are null."""
    found: dict[str, Any] = _plain(asdict(report))
    for entry, variant in zip(found["variants"], report.variants, strict=True):
        entry["used"] = _plain(variant.used)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
