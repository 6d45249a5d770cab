"""Weighs the evidence of one build step by step, and collects its warnings; see `vernier.builder.samples.weighing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vernier.budget import Judge
from vernier.builder.progress import Progress
from vernier.builder.request import AUTO, QUANTIZED, BuildRequest
from vernier.builder.samples import weighing
from vernier.builder.samples.data import ArraySamples, Samples
from vernier.builder.samples.survey import Survey, independent, surveyed
from vernier.errors import BuildError
from vernier.package.manifest import EvidenceWarning
from vernier.tensors import Array, Arrays


class EvidenceWeigher:
    """The data of one build.

    Attributes:
        warnings: what was found doubtful so far.
    """

    def __init__(self, request: BuildRequest, progress: Progress) -> None:
        self._request = request
        self._progress = progress
        asked = request.precisions
        self._reduces = asked != ("fp32",)
        self._quantizes = asked == (AUTO,) or any(precision in QUANTIZED for precision in asked)
        self._surveys: dict[str, Survey] = {}
        self._keys: dict[str, Array] = {}
        self.warnings: list[EvidenceWarning] = []

    def survey(self, source: str, arrays: Mapping[str, Array], samples: ArraySamples) -> None:
        """Reads the samples of a source once, and tells them which belong together.

        Raises:
            BuildError: the group key is no array of one value per sample, where these samples judge.
        """
        key, judges = self._request.group_key, source == self.judging_source
        keys = None
        if key is not None and (judges or key in arrays):
            if key not in arrays:
                raise BuildError(
                    f"the data '{source}' has no array '{key}': add one value per sample, equal where samples belong "
                    f"together, or name the right array with --group-key"
                )
            rows = len(arrays[samples.names[0]])
            if arrays[key].size != rows or len(arrays[key]) != rows:
                raise BuildError(
                    f"'{key}' in the data '{source}' has shape {list(arrays[key].shape)} for {rows} samples: "
                    f"--group-key names an array of one value per sample"
                )
            keys = _of_samples(np.asarray(arrays[key]).reshape(-1), len(samples))
            self._keys[source] = keys
        self._surveys[source] = surveyed(samples, keys, self._progress)

    @property
    def judging_source(self) -> str | None:
        """Where the samples that judge come from."""
        return self._request.evaluation or self._request.calibration

    def weigh_data(self, calibration: Samples | None, judged_on: Samples) -> None:
        """Raises GateRefused when calibration or evaluation data proves nothing."""
        sources = self._request.calibration, self._request.evaluation
        first, second = (None if source is None else self._surveys[source] for source in sources)
        if first is not None and calibration is not None and self._request.calibration_cache is None:
            self.warnings += weighing.weigh_calibration(first, independent(calibration), self._quantizes)
        evaluator = second or first
        if evaluator is not None:
            found = weighing.weigh_evaluation(evaluator, independent(judged_on), self._reduces)
            if (
                second is not None or not self._quantizes
            ):  # otherwise the same was said of the calibration data
                self.warnings += found
        if first is not None and second is not None and self._reduces:
            self.warnings += weighing.weigh_overlap(first, second)
            keys = [self._keys.get(source or "") for source in sources]
            if keys[0] is not None and keys[1] is not None:
                self.warnings += weighing.weigh_groups_shared(keys[0], keys[1])

    def weigh_unread(self, arrays: Mapping[str, Array], inputs: Sequence[str]) -> None:
        """Arrays of the evaluation data that may hold labels under another name."""
        request = self._request
        if request.label_key not in arrays:
            read = {*inputs, request.group_key}
            self.warnings += weighing.weigh_unread([n for n in arrays if n not in read], request.label_key)

    def weigh_answers(self, reference: Arrays, judge: Judge, judged_on: Samples) -> None:
        """Raises GateRefused when FP32 answers the same to every sample."""
        if self.judging_source is None:
            return
        self.warnings += weighing.weigh_answers(reference, self._reduces)
        self.warnings += weighing.weigh_labels(judge)
        if self._reduces:
            self.warnings += weighing.weigh_claims(judge, independent(judged_on), len(judged_on))

    def weigh_ranges(self, peaks: Mapping[str, float], activations: Sequence[str]) -> None:
        """Raises GateRefused when all quantized activations were zero in the calibration data."""
        self.warnings += weighing.weigh_ranges(peaks, activations)


def _of_samples(keys: Array, samples: int) -> Array:
    """[samples, rows]: the keys of all rows that one sample joins; rows left over are dropped."""
    rows = len(keys) // samples
    return keys[: samples * rows].reshape(samples, rows)
