"""Finds the INT8 scale of every activation from data: one streaming pass, then a choice per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from onnx import ModelProto

from vernier.builder.nodes.placement import QuantizableNode
from vernier.builder.progress import NoProgress, Progress
from vernier.builder.quantizing.counting import count, model_digest
from vernier.builder.quantizing.histogram import (
    MagnitudeHistogram,
    entropy_scale,
    errors,
    minmax_scale,
    mse_scale,
    percentile_scale,
)
from vernier.builder.quantizing.rehearsal import SwitchableQdq, damage
from vernier.builder.quantizing.taps import evenly
from vernier.builder.quantizing.watch import RangeObserver
from vernier.builder.resume import CalibrationState
from vernier.builder.samples.data import Samples, Subset
from vernier.errors import BuildError
from vernier.tensors import Array

Method = Literal["minmax", "entropy", "percentile", "mse", "best"]
METHODS: tuple[str, ...] = get_args(Method)

_SCALES = {
    "minmax": minmax_scale,
    "entropy": entropy_scale,
    "percentile": percentile_scale,
    "mse": mse_scale,
}
#: `best` judges on so many samples, and on fewer when that would take more operations than this.
_JUDGED_SAMPLES, _MIN_JUDGED = 64, 2
_JUDGED_MACS = 2.5e11
_JUDGED_ROWS = 8
#: Candidates closer than this to one another cannot matter.
_SAME = 1.10


@dataclass(frozen=True)
class Ranges:
    """INT8 scales of activations: real value = scale × integer, integers within ±127.

    scales, peaks: by value name; a peak is the largest magnitude seen.
    per_tensor_method: where the scale of each came from; with `best` they differ.
    seen: what the observer saw, None without one.
    """

    scales: dict[str, float]
    method: str
    samples: int
    per_tensor_method: dict[str, str]
    peaks: dict[str, float] = field(default_factory=dict)
    seen: Array | None = field(default=None, compare=False, repr=False)


def calibrate(
    model: ModelProto,
    nodes: Sequence[QuantizableNode],
    samples: Samples,
    method: Method = "best",
    progress: Progress | None = None,
    resume: Path | None = None,
    observer: RangeObserver | None = None,
) -> Ranges:
    """Runs `model` over all samples once and derives a scale for every activation of `nodes`.

    Memory holds one histogram (32 KiB) per activation and a few batches of activations, whatever the
    number of samples.

    Args:
        method: `best` takes each tensor's scale from the method whose error changes the outputs least.
        resume: a file that keeps what was counted so far; an interrupted run goes on from there. It is
            removed at the end. A file that is not a state of the same calibration is left alone.
        observer: looks at the values in the same pass; what it saw is in the result.

    Raises:
        BuildError: an unknown method, no samples, or the model fails on them.
        ResumeError: `resume` is a file of another kind or of another calibration, or cannot be written.
    """
    if method not in METHODS:
        raise BuildError(f"'{method}' is no calibration method; choose one of {', '.join(METHODS)}")
    if len(samples) == 0:
        raise BuildError("there are no calibration samples: give at least a few dozen")
    progress = progress or NoProgress()
    names = list(dict.fromkeys(a for node in nodes for a in node.activations))
    saved = None
    if resume is not None:
        subject = "\0".join([model_digest(model), samples.sha256, *names, str(observer is not None)])
        saved = CalibrationState(resume, subject)
    counted = count(model, names, samples, progress, saved, observer)
    histograms = counted.histograms
    if method == "best":
        scales, methods = _choose(model, nodes, samples, histograms, progress)
    else:
        scales = {name: _SCALES[method](histogram) for name, histogram in histograms.items()}
        methods = dict.fromkeys(scales, method)
    if saved is not None:
        saved.remove()
    peaks = {n: h.peak for n, h in histograms.items()}
    return Ranges(scales, method, len(samples), methods, peaks, counted.seen)


# --- choosing -------------------------------------------------------------------------------------
def _choose(
    model: ModelProto,
    nodes: Sequence[QuantizableNode],
    samples: Samples,
    histograms: Mapping[str, MagnitudeHistogram],
    progress: Progress,
) -> tuple[dict[str, float], dict[str, str]]:
    """Per tensor the method that harms the outputs least; all of one method where that harms less.

    Candidates that hardly differ are not run: there the mean squared error decides.
    """
    candidates = {name: _candidates(histogram) for name, histogram in histograms.items()}
    chosen = {name: next(iter(c)) for name, c in candidates.items()}
    if any(len(c) > 1 for c in candidates.values()):
        try:
            chosen = _compete(SwitchableQdq(model, nodes), nodes, samples, histograms, candidates, progress)
        except BuildError as error:
            progress.note(f"ranges were chosen by their squared error alone: {error}")
    return {n: _SCALES[m](histograms[n]) for n, m in chosen.items()}, chosen


def _compete(
    switchable: SwitchableQdq,
    nodes: Sequence[QuantizableNode],
    samples: Samples,
    histograms: Mapping[str, MagnitudeHistogram],
    candidates: Mapping[str, dict[str, float]],
    progress: Progress,
) -> dict[str, str]:
    """Tensor → method, by the outputs. Raises BuildError when outputs cannot be compared."""
    chosen = {name: next(iter(c)) for name, c in candidates.items()}
    open_questions = [name for name, c in candidates.items() if len(c) > 1]
    runs = sum(len(candidates[name]) for name in open_questions)
    macs = max(1, sum(node.macs for node in nodes))
    with progress.task("choosing ranges", total=runs + 1 + len(_SCALES)) as advance:
        harm = _Harm(
            switchable, samples, int(np.clip(_JUDGED_MACS / (runs * macs), _MIN_JUDGED, _JUDGED_SAMPLES))
        )
        for name in open_questions:
            caused = {}
            for method, scale in candidates[name].items():
                caused[method] = harm({name: scale})
                advance(1)
            # `candidates` starts with the least squared error: it stays unless another is clearly better.
            best = min(caused, key=lambda m: caused[m])
            if caused[best] < 0.95 * caused[chosen[name]]:
                chosen[name] = best
        # Errors of several tensors need not add up: the whole choice competes with each single method.
        most = int(np.clip(_JUDGED_MACS / (8 * macs), 8, 4 * _JUDGED_SAMPLES))
        harm = _Harm(switchable, samples, most)
        plans = [chosen, *(dict.fromkeys(chosen, m) for m in _SCALES)]
        harms = []
        for plan in plans:
            harms.append(harm({n: _SCALES[m](histograms[n]) for n, m in plan.items()}))
            advance(1)
    uniform = int(np.argmin(harms))
    return plans[uniform] if harms[uniform] < 0.98 * harms[0] else chosen


class _Harm:
    """What scales do to the outputs on at most `most` of the samples."""

    def __init__(self, switchable: SwitchableQdq, samples: Samples, most: int) -> None:
        self._switchable = switchable
        self._reference = switchable.remember(Subset(samples, evenly(len(samples), most)), _JUDGED_ROWS)

    def __call__(self, scales: Mapping[str, float]) -> float:
        return damage(self._reference, self._switchable.run(scales))


def _candidates(histogram: MagnitudeHistogram) -> dict[str, float]:
    """Method → scale, the least mean squared error first, without near repetitions of it."""
    scales = {method: derive(histogram) for method, derive in _SCALES.items()}
    if not histogram.peak:
        return {"minmax": scales["minmax"]}
    squared = errors(histogram, np.array(list(scales.values())))
    order = sorted(zip(scales, squared, strict=True), key=lambda pair: (pair[1], pair[0] != "mse"))
    kept: dict[str, float] = {}
    for method, _ in order:
        if all(max(scales[method] / s, s / scales[method]) > _SAME for s in kept.values()):
            kept[method] = scales[method]
    return kept
