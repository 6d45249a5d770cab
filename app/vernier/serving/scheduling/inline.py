"""Small batches on the event loop's own thread.

A batch that takes less time than handing it to another thread and hearing back should not be handed over:
the hand-over costs more than the loop is held up for. Both are measured, here and now.
"""

from __future__ import annotations

from vernier.engine.base import Slot
from vernier.serving.queueing.latency import LatencyCurve
from vernier.serving.queueing.span import ShapeKey
from vernier.serving.scheduling.execution import Execution

#: A hand-over measured on an idle loop is a lower bound: under load both threads also wait for each other
#: to give up the interpreter. It counts this many times, within limits that are harmless for the loop.
_UNDER_LOAD = 3.0
_SHORTEST_S, _LONGEST_S = 100e-6, 300e-6
#: What waits here runs here anyhow, one batch after the other, so it runs in as few as fit into this.
_CROWD_S = 500e-6
#: An estimate over the limit is tried again after a while, when it is not far over: load may have inflated it.
_TRY_AGAIN_S, _NOT_FAR = 1.0, 3.0

#: The device that these slots lie on, of those that an executor spans.
DEVICE_INDEX = 0


class Inline:
    """Slots that the loop's thread owns, and what executions on them take.

    Attributes:
        limit_s: variants whose smallest batch is predicted to take longer go to a worker.
        slots: precision → slot; empty when nothing here is quick enough.
    """

    def __init__(self) -> None:
        self.limit_s = _SHORTEST_S
        self.slots: dict[str, Slot] = {}
        self._curves: dict[tuple[str, ShapeKey], LatencyCurve] = {}
        self._tried: dict[tuple[str, ShapeKey], float] = {}

    def set_hand_over(self, seconds: float) -> None:
        self.limit_s = min(max(_UNDER_LOAD * seconds, _SHORTEST_S), _LONGEST_S)

    def worth_having(self, curve: LatencyCurve) -> bool:
        """Whether at least the smallest batch may turn out to be quick enough."""
        return curve.known and curve.seconds(1) <= _NOT_FAR * self.limit_s

    def room(self, precision: str, shape: ShapeKey, base: LatencyCurve) -> int:
        """The largest batch of a batch queue that is known to be quick enough here; 0 for none.

        Args:
            base: the batch queue's curve on the workers, to start from.
        """
        if precision not in self.slots:
            return 0
        curve = self._curves.get((precision, shape))
        if curve is None:
            curve = self._curves[precision, shape] = base.copy(undisturbed=True)
        return curve.rows_within(max(self.limit_s, _CROWD_S)) if curve.rows_within(self.limit_s) else 0

    def rows(self, precision: str, shape: ShapeKey, base: LatencyCurve, now: float) -> int:
        """The largest batch of a batch queue that should run inline now: `room`, or a single row to try again."""
        room = self.room(precision, shape, base)
        if room or precision not in self.slots:
            return room
        key = (precision, shape)
        if self._curves[key].seconds(1) > _NOT_FAR * self.limit_s:
            return 0
        if now - self._tried.get(key, 0.0) < _TRY_AGAIN_S:
            return 0
        self._tried[key] = now
        return 1

    def ran(self, execution: Execution) -> None:
        """Learns how long an execution took."""
        self._curves[execution.precision, execution.shape].observe(execution.rows, execution.compute_s)

    def use(self, precision: str, slot: Slot) -> None:
        """Takes a slot that is not used elsewhere."""
        self.slots[precision] = slot

    def drop(self, precision: str) -> None:
        """Closes the variant's slot, if there is one, and forgets what it took."""
        slot = self.slots.pop(precision, None)
        if slot is not None:
            slot.close()
        for key in [key for key in self._curves if key[0] == precision]:
            del self._curves[key]

    def close(self) -> None:
        for precision in list(self.slots):
            self.drop(precision)
