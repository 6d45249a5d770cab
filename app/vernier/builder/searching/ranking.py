"""Measures what low precision costs in each node alone: one cheap run for each, everything else in FP32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from onnx import ModelProto

from vernier.budget import Budget
from vernier.builder import sessions
from vernier.builder.evaluate import Evaluator, batch_rows
from vernier.builder.lowering.emulate import emulate
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.nodes.segments import Chain, cut
from vernier.builder.progress import Progress
from vernier.builder.samples.data import Samples, limit
from vernier.builder.searching.gate import make_judge, ranking_budget
from vernier.builder.searching.units import Unit, alone

_MIN_SAMPLES, _MAX_SAMPLES = 4, 48
#: The part of the model that runs again for a node: what follows it, and its own piece.
_RUN_AGAIN = 0.55
#: FP32 is timed on so many samples.
_TIMED_SAMPLES = 16


@dataclass
class Ranker:
    """Sensitivities of nodes, found once: the part of the budget that a node uses up alone.

    The budget's distances count, or `rel_spread` when it has none: labels say too little about one node.

    Args:
        recipe: everything in the precision wished for.
        samples: to choose from.
        sample_seconds: how long FP32 takes for one sample.
        seconds: as many samples are used, between 4 and 48, as fit into this time.
    """

    model: ModelProto
    recipe: Recipe
    budget: Budget
    samples: Samples
    sample_seconds: float
    seconds: float
    #: Quantized (True) or narrow float (False) → node → sensitivity.
    _found: dict[bool, dict[str, float]] = field(default_factory=lambda: {True: {}, False: {}}, init=False)

    def seconds_for(self, units: Sequence[Unit]) -> float:
        """The least time that ranking these takes."""
        return self.sample_seconds * len(units) * _MIN_SAMPLES * _RUN_AGAIN

    @property
    def quantized(self) -> dict[str, float]:
        """Node → what INT8 or FP8 in this node alone uses up, for the nodes ranked so far."""
        return self._found[True]

    @property
    def narrow(self) -> dict[str, float]:
        """Node → what FP16 or BF16 in it (and its neighbours of one unit) uses up."""
        return self._found[False]

    def rank(self, units: Sequence[Unit], progress: Progress) -> dict[Unit, float]:
        """Unit → sensitivity. What is known already is not measured again. Raises BuildError."""
        missing = [unit for unit in units if unit.nodes[0] not in self._found[unit.quantized]]
        if missing:
            self._measure(missing, progress)
        return {unit: self._found[unit.quantized][unit.nodes[0]] for unit in units}

    def _measure(self, missing: Sequence[Unit], progress: Progress) -> None:
        affordable = int(self.seconds / max(1e-9, self.sample_seconds * len(missing) * _RUN_AGAIN))
        samples = limit(self.samples, max(_MIN_SAMPLES, min(_MAX_SAMPLES, affordable)))
        pieces = cut(self.model)
        chain = Chain(pieces, self.model)
        reference = chain.remember(samples, batch_rows(samples))
        judge = make_judge(ranking_budget(self.budget, reference), reference, None)
        names = [frozenset(node.name for node in piece.graph.node) for piece in pieces]
        with progress.task("ranking nodes", len(missing)) as advance:
            for unit in missing:
                own = {*unit.nodes, *unit.with_nodes}
                touched = [index for index, inside in enumerate(names) if own & inside]
                other = {i: self._lowered(pieces[i], unit, names[i]) for i in touched}
                outputs = chain.run(touched[0], other)
                self._found[unit.quantized].update(dict.fromkeys(unit.nodes, judge.judge(outputs).used))
                advance(1)

    def _lowered(self, piece: ModelProto, unit: Unit, names: frozenset[str]) -> Any:
        recipe = alone(self.recipe, unit, names)
        inside = replace(recipe, int8=recipe.int8 & names, fp8=recipe.fp8 & names)
        return sessions.load(emulate(lower(piece, inside)))


def time_per_sample(model: ModelProto, samples: Samples) -> float:
    """Seconds that FP32 takes for one sample, from one run over a few."""
    few = limit(samples, _TIMED_SAMPLES)
    evaluator = Evaluator(model)
    began = perf_counter()
    evaluator.run(few)
    return (perf_counter() - began) / len(few)
