"""Tries assignments: on the samples that choices are made on, and on those that none was made on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from vernier.budget import Budget, Judge
from vernier.builder.evaluate import Evaluator, concatenated
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.progress import Advance
from vernier.builder.samples.data import Samples, first_and_rest, joined_groups, limit, positions
from vernier.builder.searching.caution import CautiousJudge
from vernier.builder.searching.gate import make_judge
from vernier.builder.searching.ranking import time_per_sample
from vernier.builder.searching.units import Unit, without
from vernier.errors import BuildError
from vernier.tensors import Arrays

#: The part of the budget that a selection may use up, doubt included; verification may use up all of it.
SAFETY = 0.85
#: A single evaluation takes as many samples as fit into these times. Distances show on few samples; what
#: labels say needs many, or the doubt uses up the budget.
_SELECTION_SECONDS, _LABELLED_SECONDS, _VERIFICATION_SECONDS = 3.0, 15.0, 30.0
_LEAST_SELECTION = 48
#: A model is slow when FP32 takes longer than this for all samples of a verification.
_SLOW_SECONDS = 5.0
#: A selection whose worst sample among the first so many passes the budget is not run on the others.
_GLANCE = 16
#: A base type that uses up less than this part of what it may is not looked at again.
_CLEARLY = 0.25

_Key = tuple[frozenset[str], frozenset[str], frozenset[str]]


@dataclass(frozen=True)
class Step:
    """One evaluation: how many nodes were given back, and the part of the budget that was used up.

    samples: `select` or `verify`.
    """

    given_back: int
    used: float
    samples: str


class Trials:
    """The part of a budget that a recipe uses up with some units given back, each measured once.

    Args:
        wished: the recipe with nothing given back.
        select, verify: disjoint samples, or twice the same.
        answered: samples of which both are subsets, and FP32's answers to them.

    Attributes:
        select: the samples that selections run on, as many as are affordable.
        sample_seconds: how long FP32 takes for one.
        slow: whether every further evaluation is dear.
        steps: the evaluations, in order.

    Raises:
        BuildError: FP32 itself misses the budget, or the data cannot judge it.
    """

    def __init__(
        self,
        model: ModelProto,
        wished: Recipe,
        budget: Budget,
        select: Samples,
        verify: Samples,
        answered: tuple[Samples, Arrays] | None,
        advance: Advance,
    ) -> None:
        self._model = model
        self._wished = wished
        self._budget = budget
        self._answered = answered
        self._advance = advance
        self.sample_seconds = time_per_sample(model, select)
        labelled = any(term.needs_labels for term in budget.terms)
        self._bounds_samples = budget.bounds_samples and not labelled
        seconds = _LABELLED_SECONDS if labelled else _SELECTION_SECONDS
        self.select = _at_most(select, seconds / max(1e-9, self.sample_seconds))
        self._verify = _at_most(verify, _VERIFICATION_SECONDS / max(1e-9, self.sample_seconds))
        #: All there is to count doubt on, what no choice is made on first.
        self._all = (self._verify,) if select is verify else (self._verify, self.select)
        count = sum(len(samples) for samples in self._all)
        self.slow = count * self.sample_seconds > _SLOW_SECONDS
        self._selection_judge = CautiousJudge(self._judge(self.select), count, self.select.groups)
        self._fresh_judge = self._judge(self._verify)
        self._verification_judge = CautiousJudge(self._judge(*self._all), groups=joined_groups(*self._all))
        self._glance, self._rest = first_and_rest(self.select, _GLANCE)
        self._known: dict[_Key, float] = {}
        self._verifications: dict[_Key, float] = {}
        self._answers: dict[_Key, tuple[tuple[Samples, Arrays], ...]] = {}
        self.steps: list[Step] = []

    def used(self, given: Sequence[Unit]) -> float:
        """The part of the budget that a selection uses up, on the selection samples."""
        recipe = without(self._wished, given)
        key = _key(recipe)
        if key not in self._known:
            self._known[key] = self._selected(Evaluator(lower(self._model, recipe)))
            self._note(given, self._known[key], "select")
        return self._known[key]

    def enough(self, given: Sequence[Unit]) -> bool:
        return self.used(given) <= SAFETY

    def base_strays(self, quantized: Sequence[Unit]) -> bool:
        """Whether the budget is missed without a single quantized node."""
        if quantized and self._rest is not None and self._bounds_samples:
            # A few samples tell where it is not close, and whether it was close is seen in the end.
            outputs = Evaluator(lower(self._model, without(self._wished, quantized))).run(self._glance)
            if self._selection_judge.worst_of_some(outputs) <= _CLEARLY * SAFETY:
                return False
        return not self.enough(quantized)

    def verified(self, given: Sequence[Unit]) -> float:
        """The part of the budget that is used up: by the fresh samples at their word, by all with the doubt."""
        recipe = without(self._wished, given)
        key = _key(recipe)
        if key not in self._verifications:
            evaluator = Evaluator(lower(self._model, recipe))
            outputs = [evaluator.run(self._verify)]
            used = self._fresh_judge.judge(outputs[0]).used
            if used <= 1:
                outputs += [evaluator.run(samples) for samples in self._all[1:]]
                used = self._verification_judge.used(concatenated(outputs))
            if used <= 1:
                self._answers[key] = tuple(zip(self._all, outputs, strict=True))
            self._verifications[key] = used
            self._note(given, used, "verify")
        return self._verifications[key]

    def answers(self, recipe: Recipe) -> tuple[tuple[Samples, Arrays], ...]:
        """Disjoint parts of the samples with the answers of a recipe that was verified; () if it was not."""
        return self._answers.get(_key(recipe), ())

    def _selected(self, evaluator: Evaluator) -> float:
        outputs = evaluator.run(self._glance)
        if self._rest is None:
            return self._selection_judge.used(outputs)
        used = self._selection_judge.worst_of_some(outputs)
        if used > 1:
            return used
        others = evaluator.run(self._rest)
        return self._selection_judge.used(concatenated([outputs, others]))

    def _judge(self, *parts: Samples) -> Judge:
        labels = [samples.labels for samples in parts if samples.labels is not None]
        reference = concatenated([self._reference(samples) for samples in parts])
        judge = make_judge(self._budget, reference, np.concatenate(labels) if labels else None)
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

    def _note(self, given: Sequence[Unit], used: float, samples: str) -> None:
        self.steps.append(Step(sum(len(unit.nodes) for unit in given), used, samples))
        self._advance(1)


def _at_most(samples: Samples, affordable: float) -> Samples:
    return limit(samples, max(_LEAST_SELECTION, int(affordable)))


def _key(recipe: Recipe) -> _Key:
    return recipe.int8, recipe.fp8, recipe.fp32
