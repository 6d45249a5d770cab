"""Gives nodes of a variant that misses its budget back to higher precision, as few as possible.

The errors of single nodes are measured first, one cheap run each with only that node quantized. Under
the usual model (independent noise, variances add) the best order in which to give nodes back is by
squared error for each share of time that quantizing the node saves. Along such an order the variant gets
more accurate step by step, so the shortest sufficient part is found on the real budget, by bisection around
where the model expects it: O(log n) evaluations. A second order, by error alone, competes because the
model is only a model: if its longest beginning that gives up less time suffices, it is bisected too.

What was selected on some samples is verified on others, since a selection overfits: where nodes are
selected, a safety factor must fit into the budget as well, and the result must hold on samples that no
choice was made on. If it does not, the selection is made again with more slack. Both count the doubt that
finite samples leave (`app.build.caution`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from app.budget import Budget, Judge
from app.build.caution import CautiousJudge
from app.build.data import Samples, first_and_rest, limit, positions
from app.build.evaluate import Evaluator
from app.build.gate import make_judge
from app.build.lower import Recipe, lower
from app.build.placement import QuantizableNode
from app.build.prepare import PreparedModel
from app.build.progress import Advance, Progress
from app.build.ranking import Ranker, time_per_sample
from app.build.units import Unit, float_units, kept_macs, quantized_units, without
from app.errors import BuildError
from app.tensors import Arrays

#: The part of the budget that a selection may use up, doubt included; verification may use up all of it.
SAFETY = 0.85
#: Ranking, and a single evaluation, take as many samples as fit into these times. Distances show on few
#: samples; what labels say needs many, or the doubt uses up the budget.
_RANKING_SECONDS, _SELECTION_SECONDS, _LABELLED_SECONDS, _VERIFICATION_SECONDS = 15.0, 3.0, 15.0, 30.0
_LEAST_SELECTION = 48
#: A selection whose worst sample among the first so many passes the budget is not run on the others.
_GLANCE = 16
#: A base type that uses up less than this part of what it may is not looked at again.
_CLEARLY = 0.25
#: Nodes that together save less than this part of all savings are not told apart.
_HARDLY = 0.02
_MOST_VERIFICATIONS = 4


@dataclass(frozen=True)
class Step:
    """One evaluation: how many nodes were given back, and the part of the budget that was used up.

    samples: `select` or `verify`.
    """

    given_back: int
    used: float
    samples: str


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    recipe: the precision assignment that holds.
    passed: whether it held on the verification samples; if not, `reason` says so.
    evaluations: in order, without the ranking pass.
    sensitivities: node → the part of the budget that low precision uses up in this node alone (of a recipe
        that quantizes, what quantizing it does); empty when nothing had to be ranked. A residual sum is
        measured together with its convolution.
    given_back: nodes, the first given back first.
    verified: the samples of the last verification and the recipe's answers to them.
    kept_macs: share of the quantizable nodes' multiply-accumulates that stay quantized.
    """

    recipe: Recipe
    passed: bool
    evaluations: tuple[Step, ...]
    sensitivities: dict[str, float]
    given_back: tuple[str, ...]
    kept_macs: float
    seconds: float
    reason: str = ""
    verified: tuple[Samples, Arrays] | None = None


def search(
    prepared: PreparedModel,
    recipe: Recipe,
    nodes: Sequence[QuantizableNode],
    select: Samples,
    verify: Samples,
    budget: Budget,
    progress: Progress,
    known: Mapping[str, float] | None = None,
    answered: tuple[Samples, Arrays] | None = None,
) -> SearchResult:
    """The fastest assignment at or below `recipe` that keeps the budget, by measurement.

    Args:
        recipe: everything in the precision wished for.
        nodes: the quantizable nodes; those in `recipe.int8` and `recipe.fp8` may be given back.
        select, verify: disjoint samples, with labels where the budget needs them.
        known: sensitivities that an earlier search of the same model, ranges and weights has measured.
        answered: samples of which both sets are subsets, and FP32's answers to them.

    Raises:
        BuildError: FP32 itself misses the budget, or the data cannot judge it.
    """
    began = perf_counter()
    with progress.task("searching precision") as advance:
        found = _Search(prepared, recipe, nodes, select, verify, budget, progress, advance, known, answered)
        given, holds = found.run()
    chosen = without(recipe, given)
    return SearchResult(
        recipe=chosen,
        passed=holds,
        evaluations=tuple(found.steps),
        sensitivities=found.sensitivities,
        given_back=tuple(name for unit in given for name in unit.nodes),
        kept_macs=kept_macs(nodes, chosen),
        seconds=perf_counter() - began,
        reason="" if holds else "no assignment that was selected on some samples held on others",
        verified=found.verified,
    )


class _Search:
    def __init__(
        self,
        prepared: PreparedModel,
        recipe: Recipe,
        nodes: Sequence[QuantizableNode],
        select: Samples,
        verify: Samples,
        budget: Budget,
        progress: Progress,
        advance: Advance,
        known: Mapping[str, float] | None,
        answered: tuple[Samples, Arrays] | None,
    ) -> None:
        self._model = prepared.model
        self._wished = recipe
        self._budget = budget
        self._progress = progress
        self._advance = advance
        self._answered = answered
        sample_seconds = time_per_sample(self._model, select)
        labelled = any(term.needs_labels for term in budget.terms)
        self._bounds_samples = budget.bounds_samples and not labelled
        seconds = _LABELLED_SECONDS if labelled else _SELECTION_SECONDS
        self._select = _at_most(select, seconds / max(1e-9, sample_seconds))
        self._verify = _at_most(verify, _VERIFICATION_SECONDS / max(1e-9, sample_seconds))
        self._selection_judge = CautiousJudge(self._judge(self._select))
        self._verification_judge = CautiousJudge(self._judge(self._verify))
        self._glance, self._rest = first_and_rest(self._select, _GLANCE)
        self._quantized = quantized_units(self._model, nodes, recipe)
        self._floats = float_units(self._model, nodes, recipe)
        self._ranker = Ranker(self._model, recipe, budget, self._select, sample_seconds, _RANKING_SECONDS)
        self._ranker.quantized.update(known or {})
        self._safety = SAFETY
        self._known: dict[tuple[frozenset[str], frozenset[str], frozenset[str]], float] = {}
        self.steps: list[Step] = []
        self.verified: tuple[Samples, Arrays] | None = None

    @property
    def sensitivities(self) -> dict[str, float]:
        return self._ranker.quantized if self._quantized else self._ranker.narrow

    def run(self) -> tuple[tuple[Unit, ...], bool]:
        """What to give back, and whether the rest held on the verification samples."""
        everything = (*self._quantized, *self._floats)
        given: tuple[Unit, ...] = ()
        for _ in range(_MOST_VERIFICATIONS):
            given = self._choose()
            used = self._verified(given)
            if used <= 1:
                return given, True
            if len(given) == len(everything):
                return given, False
            # Fresh samples used up more than those it was selected on: leave that much more slack.
            self._safety *= 0.8 / min(max(used, 1.0), 4.0)
        given = self._quantized if len(given) < len(self._quantized) else everything
        return given, self._verified(given) <= 1

    # --- selection -----------------------------------------------------------------------------
    def _choose(self) -> tuple[Unit, ...]:
        """What to give back so that the selection uses up no more than the safety factor allows."""
        if self._enough(()):
            return ()
        floats: tuple[Unit, ...] = ()
        if self._base_strays():
            # Without a single quantized node the base type still strays too far: mend that first.
            if not self._enough((*self._quantized, *self._floats)):
                return (*self._quantized, *self._floats)
            floats = self._shortest(self._floats, also=self._quantized)
            if self._enough(floats):
                return floats
        return (*floats, *self._shortest(self._quantized, also=floats))

    def _shortest(self, units: tuple[Unit, ...], also: tuple[Unit, ...]) -> tuple[Unit, ...]:
        """The shortest sufficient beginning of each order; of these, the one that keeps most savings.

        `also` is given back besides. All units together are taken to be enough, and none for too little. What
        saves hardly anything is not worth another evaluation.
        """
        by_price, by_error = self._orders(units)
        hardly = _HARDLY * _savings(units)
        best = by_price[: self._bisected(by_price, also, len(by_price), hardly)]
        # Of the other order only a beginning that gives up less is of interest.
        most = len(by_error)
        while most and _savings(by_error[:most]) > _savings(best) - hardly:
            most -= 1
        if not most or not self._enough((*also, *by_error[:most])):
            return best
        return by_error[: self._bisected(by_error, also, most, hardly)]

    def _bisected(self, order: tuple[Unit, ...], also: tuple[Unit, ...], enough: int, hardly: float) -> int:
        """How many of `order` are enough, `enough` being so; looked for around where it is expected."""
        error = self._ranker.rank(order, self._progress)
        middle = self._expected([error[unit] for unit in order], also)
        too_few, stride = 0, max(1, len(order) // 8)
        while enough - too_few > 1 and _savings(order[too_few:enough]) > hardly:
            middle = min(max(middle, too_few + 1), enough - 1)
            if self._enough((*also, *order[:middle])):
                enough, guess = middle, middle - stride
            else:
                too_few, guess = middle, middle + stride
            middle = guess if stride else (too_few + enough) // 2
            stride = 0
        return enough

    def _expected(self, errors: Sequence[float], also: tuple[Unit, ...]) -> int:
        """After how many nodes the errors left, taken as independent, should fit."""
        now = self._used_of(also)
        left = np.append(np.cumsum(np.square(np.minimum(errors, 1e6))[::-1])[::-1], 0.0)
        if not math.isfinite(now) or not left[0]:
            return len(errors) // 2
        fits = now * np.sqrt(left / left[0]) <= self._safety
        return int(np.argmax(fits))

    def _orders(self, units: Sequence[Unit]) -> list[tuple[Unit, ...]]:
        error = self._ranker.rank(units, self._progress)
        by_price = sorted(units, key=lambda unit: -(error[unit] ** 2) / unit.saving)
        by_error = sorted(units, key=lambda unit: -error[unit])
        return [tuple(by_price), tuple(by_error)]

    # --- measurement ---------------------------------------------------------------------------
    def _judge(self, samples: Samples) -> Judge:
        judge = make_judge(self._budget, self._reference(samples), samples.labels)
        itself = judge.judge(judge.reference)
        if not itself.passed:
            raise BuildError(f"FP32 itself misses the budget, so nothing can keep it: {itself.reason}")
        return judge

    def _reference(self, samples: Samples) -> Arrays:
        if self._answered is None:
            return Evaluator(self._model).run(samples)
        whole, answers = self._answered
        rows = positions(samples, whole)
        return {name: array[rows] for name, array in answers.items()}

    def _enough(self, given: Sequence[Unit]) -> bool:
        return self._used_of(given) <= self._safety

    def _base_strays(self) -> bool:
        """Whether the budget is missed without a single quantized node."""
        if self._quantized and self._rest is not None and self._bounds_samples:
            # A few samples tell where it is not close, and whether it was close is seen in the end.
            outputs = Evaluator(lower(self._model, without(self._wished, self._quantized))).run(self._glance)
            if self._selection_judge.worst_of_some(outputs) <= _CLEARLY * self._safety:
                return False
        return not self._enough(self._quantized)

    def _used_of(self, given: Sequence[Unit]) -> float:
        """The part of the budget that a selection uses up, on the selection samples."""
        recipe = without(self._wished, given)
        key = (recipe.int8, recipe.fp8, recipe.fp32)
        if key not in self._known:
            self._known[key] = self._selected(Evaluator(lower(self._model, recipe)))
            self._note(given, self._known[key], "select")
        return self._known[key]

    def _selected(self, evaluator: Evaluator) -> float:
        outputs = evaluator.run(self._glance)
        if self._rest is None:
            return self._selection_judge.used(outputs)
        used = self._selection_judge.worst_of_some(outputs)
        if used > 1:
            return used
        others = evaluator.run(self._rest)
        return self._selection_judge.used({n: np.concatenate([outputs[n], others[n]]) for n in outputs})

    def _verified(self, given: Sequence[Unit]) -> float:
        outputs = Evaluator(lower(self._model, without(self._wished, given))).run(self._verify)
        self.verified = self._verify, outputs
        used = self._verification_judge.used(outputs)
        self._note(given, used, "verify")
        return used

    def _note(self, given: Sequence[Unit], used: float, samples: str) -> None:
        self.steps.append(Step(sum(len(unit.nodes) for unit in given), used, samples))
        self._advance(1)


def _at_most(samples: Samples, affordable: float) -> Samples:
    return limit(samples, max(_LEAST_SELECTION, int(affordable)))


def _savings(units: Sequence[Unit]) -> float:
    return sum(unit.saving for unit in units)
