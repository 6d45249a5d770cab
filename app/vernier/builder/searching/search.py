"""Gives nodes of a variant that misses its budget back to higher precision, as few as possible.

The errors of single nodes are measured first, one cheap run each with only that node quantized. Under
the usual model (independent noise, variances add) the best order in which to give nodes back is by
squared error for each share of time that quantizing the node saves. Along such an order the variant gets
more accurate step by step, so the shortest sufficient part is found on the real budget, by bisection around
where the model expects it: O(log n) evaluations. A second order, by error alone, competes because the
model is only a model: if its longest beginning that gives up less time suffices, it is bisected too.

What was selected on some samples is verified on others, since a selection overfits: where nodes are
selected, a safety factor must fit into the budget as well, and the result must hold on samples that no
choice was made on. If it does not, more of the same order is given back. The doubt that finite samples leave
(`vernier.builder.searching.caution`) counts as that of all of them together.

Single evaluations are noisy, and the variant does not get better with every node. So in the end what was given
back and saves much is tried once more, and so is what an earlier search, in other surroundings, kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from vernier.budget import Budget
from vernier.builder.graphs.prepare import PreparedModel
from vernier.builder.lowering.lower import Recipe
from vernier.builder.nodes.placement import QuantizableNode
from vernier.builder.progress import Progress
from vernier.builder.samples.data import Samples
from vernier.builder.searching.ranking import Ranker
from vernier.builder.searching.trials import SAFETY, Step, Trials
from vernier.builder.searching.units import Unit, float_units, kept_macs, quantized_units, without
from vernier.tensors import Array, Arrays

#: Ranking takes as many samples as fit into this time.
_RANKING_SECONDS = 15.0
#: Nodes that together save less than this part of all savings are not told apart.
_HARDLY = 0.02
_MAX_VERIFICATIONS = 4
#: So many of the nodes that were given back are tried once more, and if all of these that fit are too much for fresh
#: samples, once more without the last; of a slow model fewer.
_RETURNS, _RETURNS_VERIFIED = 4, 2
_RETURNS_SLOW, _RETURNS_VERIFIED_SLOW = 2, 1


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
    verified: samples of which the recipe's answers are known, and these answers.
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
    verified: tuple[tuple[Samples, Arrays], ...] = ()


@dataclass(frozen=True)
class _Choice:
    """To give back the first `count` of `order`, and `also`."""

    also: tuple[Unit, ...] = ()
    order: tuple[Unit, ...] = ()
    count: int = 0

    @property
    def given(self) -> tuple[Unit, ...]:
        return (*self.also, *self.order[: self.count])


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
    kept: frozenset[str] = frozenset(),
) -> SearchResult:
    """The fastest assignment at or below `recipe` that keeps the budget, by measurement.

    Args:
        recipe: everything in the precision wished for.
        nodes: the quantizable nodes; those in `recipe.int8` and `recipe.fp8` may be given back.
        select, verify: disjoint samples, with labels where the budget needs them.
        known: sensitivities that an earlier search of the same model, ranges and weights has measured.
        answered: samples of which both sets are subsets, and FP32's answers to them.
        kept: quantized nodes that an earlier search kept, with another base type.

    Raises:
        BuildError: FP32 itself misses the budget, or the data cannot judge it.
    """
    began = perf_counter()
    with progress.task("searching precision") as advance:
        trials = Trials(prepared.model, recipe, budget, select, verify, answered, advance)
        found = _AssignmentSearch(prepared, recipe, nodes, budget, trials, progress, known)
        given, holds = found.run(kept)
    chosen = without(recipe, given)
    return SearchResult(
        recipe=chosen,
        passed=holds,
        evaluations=tuple(trials.steps),
        sensitivities=found.sensitivities,
        given_back=tuple(name for unit in given for name in unit.nodes),
        kept_macs=kept_macs(nodes, chosen),
        seconds=perf_counter() - began,
        reason="" if holds else "no assignment that was selected on some samples held on others",
        verified=trials.answers(chosen),
    )


class _AssignmentSearch:
    def __init__(
        self,
        prepared: PreparedModel,
        recipe: Recipe,
        nodes: Sequence[QuantizableNode],
        budget: Budget,
        trials: Trials,
        progress: Progress,
        known: Mapping[str, float] | None,
    ) -> None:
        self._progress = progress
        self._trials = trials
        self._quantized = quantized_units(prepared.model, nodes, recipe)
        self._floats = float_units(prepared.model, nodes, recipe)
        self._ranker = Ranker(
            prepared.model, recipe, budget, trials.select, trials.sample_seconds, _RANKING_SECONDS
        )
        self._ranker.quantized.update(known or {})
        self._savings = _savings(self._quantized or self._floats)

    @property
    def sensitivities(self) -> dict[str, float]:
        return self._ranker.quantized if self._quantized else self._ranker.narrow

    def run(self, kept: frozenset[str]) -> tuple[tuple[Unit, ...], bool]:
        """What to give back, and whether the rest held on the verification samples."""
        choice = self._choose()
        used = self._trials.verified(choice.given)
        for attempt in range(1, _MAX_VERIFICATIONS):
            if used <= 1 or (choice.order and choice.count == len(choice.order)):
                break
            choice = self._farther(choice, used, attempt / _MAX_VERIFICATIONS)
            used = self._trials.verified(choice.given)
        given, everything = choice.given, (*self._quantized, *self._floats)
        if used > 1:
            all_of_it = (*choice.also, *(choice.order or self._quantized))
            given = all_of_it if self._trials.verified(all_of_it) <= 1 else everything
        if kept:
            others = tuple(unit for unit in self._quantized if unit.nodes[0] not in kept)
            given = self._better((*choice.also, *others), given)
        slow = self._trials.slow
        found = self._returned(given, _RETURNS_SLOW if slow else _RETURNS)
        for fewer in found[: _RETURNS_VERIFIED_SLOW if slow else _RETURNS_VERIFIED]:
            if (better := self._better(fewer, given)) is not given:
                return better, True
        return given, self._trials.verified(given) <= 1

    def _better(self, other: tuple[Unit, ...], given: tuple[Unit, ...]) -> tuple[Unit, ...]:
        """`other` if it gives up clearly less and holds on the verification samples."""
        saves = _savings(other) <= _savings(given) - _HARDLY * self._savings
        return other if saves and self._trials.verified(other) <= 1 else given

    def _farther(self, choice: _Choice, used: float, least: float) -> _Choice:
        """More of the order, where fresh samples used up so much: as its errors let expect, and at least a part."""
        order = choice.order or self._orders(self._quantized or self._floats)[0]
        left = self._left(order)
        fits = min(used, 1e6) * np.sqrt(left / (left[choice.count] or 1.0)) <= SAFETY
        count = max(int(np.argmax(fits)), choice.count + math.ceil(least * (len(order) - choice.count)))
        return replace(choice, order=order, count=count)

    def _returned(self, given: tuple[Unit, ...], most: int) -> list[tuple[Unit, ...]]:
        """`given` without what the selection can bear after all, tried by what it saves; the fewest first."""
        found: list[tuple[Unit, ...]] = []
        tried = 0
        for unit in sorted(given, key=lambda unit: -unit.saving):
            if tried == most or unit.saving < _HARDLY * self._savings:
                break
            left = found[0] if found else given
            if self._would_fit(unit, left):
                tried += 1
                fewer = tuple(other for other in left if other is not unit)
                if self._trials.enough(fewer):
                    found.insert(0, fewer)
        return found

    def _would_fit(self, unit: Unit, given: tuple[Unit, ...]) -> bool:
        """Whether errors, taken as independent, let expect that the budget bears `unit` as well."""
        units = self._quantized if unit.quantized else self._floats
        error = self._ranker.rank(units, self._progress)
        left = sum(error[other] ** 2 for other in units if other not in given)
        more = math.sqrt(1 + error[unit] ** 2 / left) if left else 1.0
        return max(error[unit], self._trials.used(given) * more) <= SAFETY

    # --- selection -----------------------------------------------------------------------------
    def _choose(self) -> _Choice:
        """What to give back so that the selection uses up no more than the safety factor allows."""
        if self._trials.enough(()):
            return _Choice()
        floats: tuple[Unit, ...] = ()
        if self._trials.base_strays(self._quantized):
            # Without a single quantized node the base type still strays too far: that is fixed first.
            if not self._trials.enough((*self._quantized, *self._floats)):
                return _Choice(self._quantized, self._floats, len(self._floats))
            fixed = self._shortest(self._floats, also=self._quantized)
            floats = fixed.order[: fixed.count]
            if self._trials.enough(floats):
                return replace(fixed, also=())
        return self._shortest(self._quantized, also=floats)

    def _shortest(self, units: tuple[Unit, ...], also: tuple[Unit, ...]) -> _Choice:
        """The shortest sufficient beginning of each order; of these, the one that keeps most savings.

        `also` is given back besides. All units together are taken to be enough, and none for too little. What
        saves hardly anything is not worth another evaluation.
        """
        by_price, by_error = self._orders(units)
        hardly = _HARDLY * _savings(units)
        best = _Choice(also, by_price, self._bisected(by_price, also, len(by_price), hardly))
        # Of the other order only a beginning that gives up less is of interest.
        most = len(by_error)
        while most and _savings(by_error[:most]) > _savings(by_price[: best.count]) - hardly:
            most -= 1
        if not most or not self._trials.enough((*also, *by_error[:most])):
            return best
        return _Choice(also, by_error, self._bisected(by_error, also, most, hardly))

    def _bisected(self, order: tuple[Unit, ...], also: tuple[Unit, ...], enough: int, hardly: float) -> int:
        """How many of `order` are enough, `enough` being so; looked for around where it is expected."""
        middle = self._expected(order, also)
        too_few, stride = 0, max(1, len(order) // 8)
        while enough - too_few > 1 and _savings(order[too_few:enough]) > hardly:
            middle = min(max(middle, too_few + 1), enough - 1)
            if self._trials.enough((*also, *order[:middle])):
                enough, guess = middle, middle - stride
            else:
                too_few, guess = middle, middle + stride
            middle = guess if stride else (too_few + enough) // 2
            stride = 0
        return enough

    def _expected(self, order: tuple[Unit, ...], also: tuple[Unit, ...]) -> int:
        """After how many nodes the errors left, taken as independent, should fit."""
        now = self._trials.used(also)
        left = self._left(order)
        if not math.isfinite(now) or not left[0]:
            return len(order) // 2
        fits = now * np.sqrt(left / left[0]) <= SAFETY
        return int(np.argmax(fits))

    def _left(self, order: Sequence[Unit]) -> Array:
        """Sum of the squared errors of those still in low precision, after none, the first, the second … of `order`."""
        error = self._ranker.rank(order, self._progress)
        squares = np.square([min(error[unit], 1e6) for unit in order])
        return np.append(np.cumsum(squares[::-1])[::-1], 0.0)

    def _orders(self, units: Sequence[Unit]) -> list[tuple[Unit, ...]]:
        error = self._ranker.rank(units, self._progress)
        by_price = sorted(units, key=lambda unit: -(error[unit] ** 2) / unit.saving)
        by_error = sorted(units, key=lambda unit: -error[unit])
        return [tuple(by_price), tuple(by_error)]


def _savings(units: Sequence[Unit]) -> float:
    return sum(unit.saving for unit in units)
