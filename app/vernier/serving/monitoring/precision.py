"""The precision monitor: a share of live answers is computed again at FP32, and a variant that strays falls back.

It never stands in a request's way: answered requests are handed over by reference, computed on a thread
of its own, and dropped (and counted) while that thread is busy. New batches move to the next safer
variant in one step; recovery needs sustained evidence after a cool-down that doubles with each relapse.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vernier.accuracy import Comparison
from vernier.budget import Budget
from vernier.engine.base import Executor, run_once
from vernier.engine.pool import OpenSlots, Worker
from vernier.errors import EngineError
from vernier.metrics import ModelMetrics
from vernier.package.manifest import PRECISIONS
from vernier.serving.monitoring.drift import DriftAlarm, RecoveryTest
from vernier.tensors import Arrays

logger = logging.getLogger(__name__)

REFERENCE = "fp32"
_PENDING_LIMIT = 4
_MAX_ROWS = 16


@dataclass(frozen=True)
class MonitorOptions:
    """cool_down_s: how long a variant that fell back stays suspended at least; it doubles with each relapse."""

    cool_down_s: float = 300.0


@dataclass(frozen=True)
class Judged:
    """Per metric, the errors of one request's samples; and whether any of them was beyond its limit."""

    errors: dict[str, list[float]]
    over: bool


class LiveBudget:
    """A variant's budget, applied to one request at a time.

    The statistic of a term says how it was proven over a set; one request is held sample by sample
    against the same number.

    Args:
        limits: as a variant's `budget` in the manifest.
        spreads: output → the spread of its FP32 values (see vernier.accuracy), which one request cannot tell.
    """

    def __init__(self, limits: Mapping[str, float], spreads: Mapping[str, float]) -> None:
        self._terms = Budget.from_limits(limits).terms if limits else ()
        self._spreads = spreads

    def judge(self, reference: Arrays, candidate: Arrays) -> Judged:
        errors: dict[str, list[float]] = {}
        over = False
        for term in self._terms:
            for name in reference if term.output is None else {term.output} & reference.keys():
                compared = Comparison(reference[name], candidate[name], self._spreads.get(name))
                values = compared.per_sample(term.metric)
                errors.setdefault(term.metric, []).extend(float(v) for v in values)
                beyond = values < term.limit if term.at_least else values > term.limit
                over = over or bool(np.any(beyond))
        return Judged(errors, over)


class PrecisionMonitor:
    """Watches one model version. Belongs to the event loop's thread.

    Args:
        executors: by precision; without the reference among them samples are dropped until it joins.
        budgets: by precision, what the build proved; of those too that may join.
        active, activate: read and set the precision that new batches take.
    """

    def __init__(
        self,
        name: str,
        executors: Mapping[str, Executor],
        budgets: Mapping[str, LiveBudget],
        active: Callable[[], str],
        activate: Callable[[str], None],
        metrics: ModelMetrics,
        options: MonitorOptions,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._budgets = budgets
        self._active = active
        self._activate = activate
        self._metrics = metrics
        self._preferred = active()
        self._ladder = sorted(executors, key=PRECISIONS.index)
        self._alarms = {p: DriftAlarm() for p in executors}
        self._recovery = RecoveryTest()
        self._cool_down_s = options.cool_down_s
        self._suspended_until = 0.0
        self._pending = 0
        self._closed = False
        self._worker = Worker(f"{name}-monitor", list(executors.values()), lambda *_: None, self._on_exit)

    def join(self, executor: Executor) -> None:
        """A variant that came while the model was served, or in place of an earlier one; it is watched from now on."""
        precision = executor.precision
        self._ladder = sorted({*self._ladder, precision}, key=PRECISIONS.index)
        self._alarms[precision] = DriftAlarm()

        def swap(slots: OpenSlots) -> None:
            old = slots.pop(precision, None)
            if old is not None:
                old.close()
            try:
                slots[precision] = executor.open_slot()
            except EngineError as error:
                logger.error(
                    "the monitor cannot run a variant",
                    extra={"model": self._name, "precision": precision, "error": error.message},
                )

        if not self._closed:
            self._worker.submit(swap)

    def prefer(self, precision: str) -> None:
        """New batches take `precision`, which must have joined; one that is suspended stays suspended."""
        if precision != self._preferred:
            self._preferred = precision
            self._recovery.reset()
            self._activate(precision)

    def tap(self, inputs: Arrays, outputs: Arrays, precision: str) -> None:
        """Is shown a sample of the answered requests; FP32's own answers tell nothing unless a variant is suspended."""
        if precision != REFERENCE or self._active() != self._preferred:
            self.observe(inputs, outputs, precision)

    def observe(self, inputs: Arrays, outputs: Arrays, precision: str) -> None:
        """Takes an answered request, whose arrays must not change afterwards."""
        if self._closed:
            return
        if self._pending >= _PENDING_LIMIT or not self._worker.alive or REFERENCE not in self._ladder:
            self._metrics.precision_sample("dropped")
            return
        self._pending += 1
        suspended = self._preferred if self._active() != self._preferred else None
        first = {n: a[:_MAX_ROWS] for n, a in inputs.items()}
        answered = {n: a[:_MAX_ROWS] for n, a in outputs.items()}

        def shadow(slots: OpenSlots) -> None:
            results: dict[str, Judged] = {}
            failed = False
            try:
                reference = run_once(slots[REFERENCE], first)
                reference = {n: reference[n] for n in answered}
                if precision != REFERENCE:
                    results[precision] = self._budgets[precision].judge(reference, answered)
                if suspended is not None and suspended != precision:
                    candidate = run_once(slots[suspended], first)
                    shown = {n: candidate[n] for n in answered}
                    results[suspended] = self._budgets[suspended].judge(reference, shown)
            except Exception:
                logger.exception("shadow run failed", extra={"model": self._name})
                failed = True
            self._loop.call_soon_threadsafe(self._judged, None if failed else results, precision)

        self._worker.submit(shadow)

    def _judged(self, results: dict[str, Judged] | None, answered_by: str) -> None:
        self._pending -= 1
        if results is None:
            self._metrics.precision_sample("failed")
            return
        for precision, judged in results.items():
            for metric, values in judged.errors.items():
                for value in values:
                    self._metrics.precision_error(precision, metric, value)
            if precision == answered_by:
                self._metrics.precision_sample("over" if judged.over else "within")
                if self._alarms[precision].add(judged.over) and precision == self._active():
                    self.fall_back("budget")
            elif precision == self._preferred:
                self._consider_recovery(judged.over)

    def fall_back(self, reason: str) -> None:
        """New batches take the next safer variant; nothing happens when FP32 is active already."""
        current = self._active()
        position = self._ladder.index(current)
        if position == 0:
            return
        safer = self._ladder[position - 1]
        if current != self._preferred:
            self._recovery.reset()
        self._alarms[current].reset()
        self._suspended_until = self._loop.time() + self._cool_down_s
        self._cool_down_s *= 2
        self._activate(safer)
        self._metrics.fallback(current, safer, reason)
        logger.error(
            "precision fallback", extra={"model": self._name, "from": current, "to": safer, "reason": reason}
        )

    def _consider_recovery(self, over: bool) -> None:
        ready = self._recovery.add(over)
        if not ready or self._loop.time() < self._suspended_until:
            return
        current = self._active()
        self._recovery.reset()
        self._alarms[self._preferred].reset()
        self._activate(self._preferred)
        self._metrics.fallback(current, self._preferred, "recovered")
        logger.warning(
            "precision recovered", extra={"model": self._name, "from": current, "to": self._preferred}
        )

    def _on_exit(self, worker: Worker, error: BaseException | None) -> None:
        if error is not None:
            logger.error("precision monitor died", extra={"model": self._name}, exc_info=error)

    async def close(self, timeout_s: float) -> None:
        """Drops what waits and ends the thread."""
        self._closed = True
        self._worker.close()
        await asyncio.to_thread(self._worker.join, timeout_s)
