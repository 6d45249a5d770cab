"""Makes the graph of each precision: calibrates once, rounds once, and lowers as often as it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

from onnx import ModelProto

from vernier.builder.graphs.prepare import PreparedModel
from vernier.builder.lowering.lower import Form, Recipe, lower
from vernier.builder.lowering.quantized import INT8_MAX, QuantizedWeight
from vernier.builder.nodes.placement import QuantizableNode, float_notes, quantizable_nodes
from vernier.builder.progress import Progress
from vernier.builder.quantizing.calibrate import Method, Ranges, calibrate
from vernier.builder.quantizing.half import half_hazards, hazard_notes, hazards_of
from vernier.builder.quantizing.modelopt import Proposal, propose
from vernier.builder.quantizing.watch import RangeObserver
from vernier.builder.quantizing.weights import WeightMethod, quantize_weights
from vernier.builder.request import AUTO, DEFAULT_METHOD, QUANTIZED, BuildRequest
from vernier.builder.samples.data import Samples, limit
from vernier.errors import BuildError
from vernier.package.calibration import Calibration, check_calibration, read_calibration

_BASES = {
    "fp32": "fp32",
    "tf32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "int8-fp32": "fp32",
    "int8": "fp16",
    "fp8": "fp16",
}
_INT8 = {"int8", "int8-fp32", AUTO}
#: Rounding weights learns little from more samples than these.
_WEIGHT_SAMPLES = 256
#: How much farther than the largest value seen.
_ROOM = 1.25
_WEIGHT_METHOD: WeightMethod = "best"


class VariantBuilder:
    """Recipes and graphs of one prepared model.

    What several precisions need (ranges, rounded weights, overflowing nodes) is found when first asked for.

    Args:
        calibration: samples for ranges, weights and overflow; None when there are none.
        spare: other samples, which may show overflow when there is no calibration data.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        calibration: Samples | None,
        spare: Samples | None,
        request: BuildRequest,
        progress: Progress,
    ) -> None:
        self.prepared = prepared
        self.calibration = calibration
        self._request = request
        self._progress = progress
        self._spare = spare
        self._reused: Calibration | None = None
        self._hazards: dict[str, dict[str, str]] = {}
        self._proposals: dict[str, Proposal] = {}

    def reuse(self, cache: Path) -> None:
        """Takes ranges and rounded weights from a calibration cache instead of from data.

        Raises BuildError, naming both sides, when it was made for something else.
        """
        found = read_calibration(cache)
        tensors = {activation for node in self.nodes for activation in node.activations}
        check_calibration(
            found, cache, self.prepared.source_sha256, tensors, self._request.calibration_method
        )
        self._reused = found

    @cached_property
    def nodes(self) -> list[QuantizableNode]:
        sizes = {
            name: dim.opt for name, dim in self.prepared.dims.items() if name != self.prepared.batching.dim
        }
        return quantizable_nodes(self.prepared.model, sizes)

    @cached_property
    def ranges(self) -> Ranges:
        if self._reused is not None:
            kept = self._reused
            return Ranges(kept.scales, kept.method, kept.samples, kept.per_tensor_method, kept.peaks)
        found = self._calibrated
        if not self._asks_modelopt or not _INT8.intersection(self._request.precisions):
            return found
        proposed = self._proposal("int8").ranges
        return replace(
            found,
            method="modelopt",
            scales={**found.scales, **proposed},
            per_tensor_method={**found.per_tensor_method, **dict.fromkeys(proposed, "modelopt")},
        )

    @cached_property
    def _calibrated(self) -> Ranges:
        return calibrate(
            self.prepared.model,
            self.nodes,
            self._calibration_samples(),
            cast(Method, self._request.calibration_method or DEFAULT_METHOD),
            self._progress,
            self._request.resume,
            self._observer,
        )

    @cached_property
    def _observer(self) -> RangeObserver | None:
        """Looks for overflow while calibration data runs, if there will be both ranges and a narrow type."""
        asked = self._request.precisions
        quantizes, narrows = (
            asked == (AUTO,) or any(test(precision) for precision in asked)
            for test in (QUANTIZED.__contains__, lambda precision: _BASES.get(precision) != "fp32")
        )
        if not (quantizes and narrows) or self._reused is not None or self.calibration is None:
            return None
        return RangeObserver(self.prepared.model) if self.nodes else None

    @property
    def _asks_modelopt(self) -> bool:
        return self._request.quantizer == "modelopt"

    def _proposal(self, precision: str) -> Proposal:
        """What ModelOpt would do, asked once for each precision. Raises BuildError."""
        if precision not in self._proposals:
            samples = self.calibration or self._spare
            if samples is None:
                raise BuildError("ModelOpt needs data: give --calibration")
            with self._progress.task(f"asking ModelOpt about {precision}"):
                self._proposals[precision] = propose(self.prepared.model, self.nodes, samples, precision)
        return self._proposals[precision]

    @cached_property
    def weights(self) -> Mapping[str, QuantizedWeight]:
        if self._reused is not None and self._reused.weights:
            return {name: QuantizedWeight.restored(stored) for name, stored in self._reused.weights.items()}
        samples = None if self.calibration is None else limit(self.calibration, _WEIGHT_SAMPLES)
        return quantize_weights(
            self.prepared.model,
            self.nodes,
            samples,
            _WEIGHT_METHOD,
            self._progress,
            ranges=self.ranges.scales,
        )

    def calibration_record(self, tools: Mapping[str, str]) -> Calibration | None:
        """What a later build needs to make the same graphs without calibrating; None when nothing was calibrated."""
        if self._reused is not None:
            return self._reused
        if "ranges" not in self.__dict__ or self.calibration is None:
            return None
        return Calibration(
            model_sha256=self.prepared.source_sha256,
            data_sha256=self.calibration.sha256,
            method=self.ranges.method,
            samples=self.ranges.samples,
            scales=self.ranges.scales,
            per_tensor_method=self.ranges.per_tensor_method,
            peaks=self.ranges.peaks,
            weights=dict(self.weights) if "weights" in self.__dict__ else {},
            weight_method=_WEIGHT_METHOD,
            tools=dict(tools),
        )

    def hazards(self, base: str) -> Mapping[str, str]:
        """Node → why it must stay FP32 in a graph of this type, found by running data."""
        if base == "fp32":
            return {}
        if base not in self._hazards and self._observer is not None:
            seen = self._calibrated.seen
            assert seen is not None
            self._hazards[base] = hazards_of(self.prepared.model, self._observer, seen, base)
        if base not in self._hazards:
            samples = self.calibration or self._spare
            if samples is None:
                raise BuildError(
                    f"{base.upper()} needs data that shows overflow: give --calibration or --eval"
                )
            self._hazards[base] = half_hazards(self.prepared.model, samples, base, progress=self._progress)
        return self._hazards[base]

    @property
    def calibrated(self) -> str:
        """How the ranges were found, in words; empty when nothing was quantized."""
        if "ranges" not in self.__dict__:
            return ""
        counts = Counter(self.ranges.per_tensor_method.values())
        methods = ", ".join(f"{count} by {method}" for method, count in counts.most_common())
        again = "reused from a cache, " if self._reused is not None else ""
        return f"{again}{self.ranges.method} over {self.ranges.samples} samples ({methods or 'nothing to calibrate'})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report should tell about nodes that stay in float."""
        found = float_notes(self.prepared.model) if "ranges" in self.__dict__ else ()
        return found + tuple(
            note for base, found in self._hazards.items() for note in hazard_notes(dict(found), base)
        )

    def _calibration_samples(self) -> Samples:
        if self.calibration is None:
            raise BuildError(
                "INT8 and FP8 need calibration data: give --calibration an .npz, a folder of .npy or module:function"
            )
        return self.calibration

    def recipe(self, precision: str) -> Recipe:
        """Everything in `precision` that can be. Raises BuildError when there is nothing, or no data for it."""
        base = _BASES[precision]
        recipe = Recipe(base=base, fp32=frozenset(self.hazards(base)))
        if precision not in QUANTIZED:
            if self._asks_modelopt and precision == base != "fp32":
                return replace(recipe, fp32=recipe.fp32 | self._proposal(base).fp32)
            return recipe
        if not self.nodes:
            raise BuildError(
                f"the model has no convolution, Gemm or MatMul of FP32 (or only ones with Q/DQ nodes of their own) "
                f"that could run in {precision}: build it in fp16 instead"
            )
        names = frozenset(node.name for node in self.nodes)
        if self._asks_modelopt:
            names = self._proposal("fp8" if precision == "fp8" else "int8").nodes
        if precision == "fp8":
            return replace(recipe, fp8=names, ranges=self._fp8_ranges)
        return replace(recipe, int8=names, ranges=self.ranges.scales, weights=self.weights)

    @property
    def _fp8_ranges(self) -> dict[str, float]:
        """Twice as far as the largest value seen: FP8 resolves small numbers as well as large ones, so that
        room costs nothing, and clipping costs what it does in INT8."""
        found = self.ranges
        peaks = {name: 2 * found.peaks.get(name, 0.0) / INT8_MAX for name in found.scales}
        return {name: max(scale, peaks[name]) for name, scale in found.scales.items()}

    def reaching(self, recipe: Recipe) -> Recipe:
        """The recipe with ranges that reach somewhat farther than calibration saw.

        Clipping rare large values is the lesser error on average, but not for the samples that have
        them, and fresh samples pass the largest value of a few hundred others now and then.
        """
        wide = {n: max(s, _ROOM * self.ranges.peaks.get(n, 0.0) / INT8_MAX) for n, s in recipe.ranges.items()}
        return replace(recipe, ranges=wide)

    def graph(self, recipe: Recipe, form: Form = "strong") -> ModelProto:
        return lower(self.prepared.model, recipe, form)

    def type_of(self, node: str, recipe: Recipe) -> str:
        """The type that a node computes in."""
        if node in recipe.int8:
            return "int8"
        if node in recipe.fp8:
            return "fp8"
        return "fp32" if node in recipe.fp32 else recipe.base

    def assignment(self, recipe: Recipe) -> dict[str, int]:
        """How many of the weighted nodes run in which type."""
        return dict(Counter(self.type_of(node.name, recipe) for node in self.nodes if node.op_type != "Add"))
