"""`build_engine.py compare A B`: how far two models, variants or packages are from each other on the same data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vernier.accuracy import compare_outputs, find_task
from vernier.budget import Budget
from vernier.builder.evaluate import Evaluator
from vernier.builder.inspection import open_checked
from vernier.builder.request import DEFAULT_LABEL_KEY
from vernier.builder.samples.data import ArraySamples, Samples, load_samples
from vernier.errors import AccuracyError, BuildError, PackageError
from vernier.package.golden import load_golden
from vernier.package.manifest import RUNTIMES


@dataclass(frozen=True)
class Side:
    """One of the two models. `package` is set when the file is a package's variant."""

    label: str
    model: Path
    package: Path | None = None


@dataclass(frozen=True)
class CompareResult:
    """How B differs from A.

    outputs: output → metric → value, B measured against A.
    tasks: metric → (A, B), where the data has labels.
    refusal: what a budget found wanting, None without a budget or when it holds.
    """

    a: str
    b: str
    samples: int
    outputs: dict[str, dict[str, float]]
    tasks: dict[str, tuple[float, float]] = field(default_factory=dict)
    refusal: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; non-finite numbers as text, which JSON lacks."""
        return {
            "a": self.a,
            "b": self.b,
            "samples": self.samples,
            "outputs": {o: {m: _plain(v) for m, v in metrics.items()} for o, metrics in self.outputs.items()},
            "tasks": {m: {"a": _plain(a), "b": _plain(b)} for m, (a, b) in self.tasks.items()},
            "refusal": self.refusal,
        }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def find_side(text: str) -> Side:
    """`model.onnx`, `engines/ranker/3` (the variant that serves) or `engines/ranker/3:int8`.

    Raises BuildError.
    """
    path = Path(text)
    if path.is_file():
        return Side(text, path)
    folder, _, precision = text.rpartition(":") if not path.is_dir() else (text, "", "")
    if not folder or not Path(folder).is_dir():
        raise BuildError(
            f"there is no model at '{text}': give an ONNX file, a package such as engines/ranker/3, or one of "
            f"its variants as engines/ranker/3:int8"
        )
    package = Path(folder)
    manifest = open_checked(package)
    precision = precision or next((manifest.decision[r] for r in RUNTIMES if r in manifest.decision), "fp32")
    if precision not in manifest.variants:
        raise BuildError(f"{package} has no variant '{precision}': it has {', '.join(manifest.variants)}")
    return Side(f"{folder}:{precision}", package / manifest.variants[precision].files[0], package)


def compare(
    a: Side, b: Side, data: str | None = None, label_key: str = "label", budget: Budget | None = None
) -> CompareResult:
    """Runs both on the same samples; without `data`, on the golden vectors of the first package among them.

    Raises:
        BuildError: the data does not fit, or the two have different inputs or outputs.
    """
    left, right = Evaluator(a.model, as_on_gpu=False), Evaluator(b.model, as_on_gpu=False)
    if [(s.name, s.dtype) for s in left.inputs] != [(s.name, s.dtype) for s in right.inputs]:
        raise BuildError(f"{a.label} and {b.label} take different inputs: compare versions of one model")
    if set(left.output_names) != set(right.output_names):
        raise BuildError(f"{a.label} and {b.label} have different outputs: compare versions of one model")
    named = label_key != DEFAULT_LABEL_KEY
    samples = load_samples(data, left.inputs, label_key, named) if data is not None else _golden(a, b)
    answers = left.run(samples), right.run(samples)
    tasks = {}
    try:
        outputs = {name: compare_outputs(answers[0][name], answers[1][name]) for name in left.output_names}
        if samples.labels is not None:
            task = find_task(answers[0], samples.labels)
            tasks[task.metric] = (
                task.measure(answers[0], samples.labels),
                task.measure(answers[1], samples.labels),
            )
        verdict = budget.judge(answers[0], answers[1], samples.labels) if budget is not None else None
    except AccuracyError as error:
        raise BuildError(
            f"the two cannot be compared on {data or 'the golden vectors'}: {error.message}"
        ) from error
    refusal = None if verdict is None or verdict.passed else verdict.reason
    return CompareResult(a.label, b.label, len(samples), outputs, tasks, refusal)


def _golden(a: Side, b: Side) -> Samples:
    package = a.package or b.package
    golden = open_checked(package).golden if package is not None else None
    if package is None or golden is None:
        raise BuildError("there is no data to compare on: give --data x.npz")
    try:
        return ArraySamples(load_golden(package / golden).inputs)
    except PackageError as error:
        raise BuildError(error.message) from error


def render(result: CompareResult) -> Group:
    """A table for a terminal: a row per metric, a column per output."""
    table = Table("metric", *result.outputs, title_justify="left")
    metrics = dict.fromkeys(metric for found in result.outputs.values() for metric in found)
    for metric in metrics:
        table.add_row(metric, *(_number(found.get(metric)) for found in result.outputs.values()))
    parts: list[Any] = [Text(f"{result.b} against {result.a}, {result.samples} samples", style="bold"), table]
    for metric, (left, right) in result.tasks.items():
        parts.append(Text(f"{metric}: {left:.6g} against {right:.6g} ({right - left:+.2g})"))
    if result.refusal is not None:
        parts.append(Text(f"refused: {result.refusal}", style="red"))
    return Group(*parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
