"""A model version that several engine processes serve: each batch goes to the one that is least busy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vernier.border.batch import RequestBatch
from vernier.border.catalogue import SchedulerObserver
from vernier.border.front_side.remote_model import RemoteModel
from vernier.errors import QueueFull, VernierError


class ReplicatedModel:
    """Satisfies ServedModel, and is its own scheduler.

    Args:
        replicas: of one name and version; the first says what inputs and outputs are, others that differ are not used.
    """

    def __init__(self, replicas: Sequence[RemoteModel]) -> None:
        first = replicas[0]
        self.name, self.version, self.signature = first.name, first.version, first.signature
        self.metrics = first.metrics
        self.update(replicas)

    def update(self, replicas: Sequence[RemoteModel]) -> bool:
        """Takes what serves the version now; False when its inputs and outputs are others than before."""
        same = [replica for replica in replicas if replica.signature == self.signature]
        if not same:
            return False
        reachable = [replica for replica in same if replica.reachable]
        self._replicas = reachable or same
        return True

    @property
    def precision(self) -> str:
        return self._replicas[0].precision

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that any engine process has loaded."""
        return tuple(dict.fromkeys(p for replica in self._replicas for p in replica.precisions))

    @property
    def runtime(self) -> str:
        return self._replicas[0].runtime

    @property
    def state(self) -> str:
        return self._replicas[0].state

    @property
    def scheduler(self) -> ReplicatedModel:
        return self

    def description(self) -> dict[str, Any]:
        return self._replicas[0].description()

    # --- requests ---------------------------------------------------------------------------------
    def submit(self, batch: RequestBatch) -> None:
        replicas = self._replicas
        replica = (
            replicas[0] if len(replicas) == 1 else min(replicas, key=lambda r: _cost(r, batch.precision))
        )
        replica.submit(batch)

    def cancel(self, batch: RequestBatch, index: int) -> None:
        if batch.state is not None:
            batch.state.cancel(index)

    def refusal(
        self, precision: str | None = None, priority: int = 0, deadline: float | None = None
    ) -> VernierError | None:
        """None when an engine process would take a request; else the refusal that is over first."""
        refusals = []
        for replica in self._replicas:
            refusal = replica.refusal()
            if refusal is None:
                return None
            refusals.append(refusal)
        full = [refusal for refusal in refusals if isinstance(refusal, QueueFull)]
        return min(full, key=lambda refusal: refusal.retry_after_s) if full else refusals[0]

    def refused(self, error: VernierError, count: int = 1, rows: int = 1) -> None:
        self._replicas[0].refused(error, count)

    def watch(self, observer: SchedulerObserver) -> None:
        raise TypeError("a scheduler is watched where it runs")


def _cost(replica: RemoteModel, precision: str | None) -> tuple[bool, bool, int]:
    """The least is best: whether it would refuse, whether it lacks the precision, how much it has of this front."""
    lacks = precision is not None and precision not in replica.precisions
    return replica.refusal() is not None, lacks, replica.open_rows
