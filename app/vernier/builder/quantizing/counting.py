"""One streaming pass over calibration data: histograms of activations, and what an observer sees beside them.

What was counted is saved now and then, so that an interrupted pass goes on where it ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from vernier.builder.graphs.store import skeleton
from vernier.builder.progress import Progress
from vernier.builder.quantizing.histogram import MagnitudeHistogram
from vernier.builder.quantizing.taps import IntermediateOutputs
from vernier.builder.quantizing.watch import RangeObserver
from vernier.builder.resume import CalibrationState
from vernier.builder.samples.data import Samples, Subset
from vernier.tensors import Array, Arrays

#: So many numbers of a value make a histogram; of large values each sample gives an equal share.
_NUMBERS, _MIN_NUMBERS = 1 << 23, 1 << 13
#: The state is saved after this share of the samples.
_SAVES = 20


@dataclass(frozen=True)
class Counted:
    """histograms: by value name. seen: what the observer saw, None without one."""

    histograms: dict[str, MagnitudeHistogram]
    seen: Array | None


def count(
    model: ModelProto,
    names: Sequence[str],
    samples: Samples,
    progress: Progress,
    saved: CalibrationState | None = None,
    observer: RangeObserver | None = None,
) -> Counted:
    """Counts the values `names`; see `vernier.builder.quantizing.calibrate.calibrate`. Raises BuildError."""
    fresh = Counted(
        {name: MagnitudeHistogram() for name in names}, None if observer is None else observer.nothing_yet()
    )
    wanted = [*names, *(observer.names if observer else ())]
    if not wanted:
        return fresh
    intermediate = IntermediateOutputs(model, wanted)
    state, done = fresh, 0
    found = None if saved is None else saved.read()
    if found is not None:
        state, done = _restored(found, fresh)
        progress.note(f"going on with an interrupted calibration: {done} of {len(samples)} samples are done")
    if done == len(samples):
        return state
    histograms, seen = state.histograms, state.seen
    left = Subset(samples, np.arange(done, len(samples))) if done else samples
    most = max(_MIN_NUMBERS, _NUMBERS // len(samples))

    def digest(values: Arrays, real: int, _: int) -> tuple[list[MagnitudeHistogram], Array | None]:
        tallies = [_tally(values[name], real, most) for name in names]
        return tallies, observer.observe(values) if observer else None

    unsaved = 0
    with progress.task("calibrating", total=len(samples)) as advance:
        advance(done)
        for (tallies, looks), real in intermediate.digests(left, intermediate.rows(samples), digest):
            for name, histogram in zip(names, tallies, strict=True):
                histograms[name].merge(histogram)
            if observer is not None and seen is not None and looks is not None:
                seen = observer.merge(seen, looks)
            done, unsaved = done + real, unsaved + real
            advance(real)
            if saved is not None and unsaved * _SAVES >= len(samples):
                saved.write(_arrays(Counted(histograms, seen), done))
                unsaved = 0
    return Counted(histograms, seen)


def _tally(values: Array, real: int, most: int) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    if values.ndim and len(values) == real:
        histogram.add_some(values, most)
    else:
        histogram.add(values)
    return histogram


def model_digest(model: ModelProto) -> str:
    """sha256 of a model of any size: its graph, then every weight."""
    digest = hashlib.sha256(skeleton(model).SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        digest.update(tensor.raw_data)
    return digest.hexdigest()


def _arrays(counted: Counted, done: int) -> Arrays:
    """What `_restored` reads."""
    arrays: Arrays = {"done": np.array(done)}
    for index, histogram in enumerate(counted.histograms.values()):
        arrays.update({f"{index}.{key}": value for key, value in histogram.state().items()})
    if counted.seen is not None:
        arrays["seen"] = counted.seen
    return arrays


def _restored(arrays: Arrays, fresh: Counted) -> tuple[Counted, int]:
    """What was counted, for the same values as `fresh`, and of how many samples."""
    histograms = {
        name: MagnitudeHistogram.restore(_state(arrays, index)) for index, name in enumerate(fresh.histograms)
    }
    return Counted(histograms, None if fresh.seen is None else arrays["seen"]), int(arrays["done"])


def _state(archive: Mapping[str, Array], index: int) -> dict[str, Array]:
    return {key: archive[f"{index}.{key}"] for key in ("counts", "facts", "peak")}
