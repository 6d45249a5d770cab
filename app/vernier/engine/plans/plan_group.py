"""The plans of one package on several GPUs: a variant serves once it has proven itself on every one of them.

GPUs of one kind share the plan cache, so a plan is built once and loaded by each. A variant that one GPU
refuses is refused on all: what a request gets must not depend on where it lands.
"""

from __future__ import annotations

import threading
from typing import Callable, Dict, List, Optional, Protocol, Sequence, Set

from vernier.engine.plans.multi_device import MultiDeviceExecutor
from vernier.engine.validated import ValidatedEngine, choose


class Plans(Protocol):
    """What a package's plans promise, on one GPU (`PlanManager`) and on several (`PlanGroup`)."""

    @property
    def ready(self) -> Dict[str, ValidatedEngine]:
        """Precision → engine, of every variant that may take traffic."""
        ...

    @property
    def refused(self) -> Dict[str, str]:
        """Precision → why it will not be served."""
        ...

    @property
    def pending(self) -> List[str]:
        """The precisions that are still to be built."""
        ...

    def best(self) -> Optional[ValidatedEngine]:
        """The engine that new batches should take now; None while none is ready."""
        ...

    def start(self) -> None:
        """Loads every plan that fits; builds the others. Blocks; call it once."""
        ...

    def close(self) -> None:
        """Ends a running build and closes every executor. Slots must be closed before. Idempotent."""
        ...


class PlanGroup:
    """See `Plans`. Thread-safe.

    Args:
        make: makes the plans of the GPU with this index; it must call the callback for each variant that
            becomes ready there after its start.
        devices: how many GPUs there are.
        on_ready: called for each variant that becomes ready everywhere after `start` returned.
    """

    def __init__(
        self,
        make: Callable[[int, Callable[[ValidatedEngine], None]], Plans],
        devices: int,
        wanted: str,
        on_ready: Callable[[ValidatedEngine], None],
    ) -> None:
        self._members: Sequence[Plans] = [make(index, self._arrived) for index in range(devices)]
        self._wanted = wanted
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._ready: Dict[str, ValidatedEngine] = {}
        self._started = False

    def start(self) -> None:
        for member in self._members:
            member.start()
        with self._lock:
            self._gather()
            self._started = True

    def _arrived(self, engine: ValidatedEngine) -> None:
        """Some GPU has one more."""
        with self._lock:
            if not self._started:
                return
            new = self._gather()
        for joined in new:
            self._on_ready(joined)

    def _gather(self) -> List[ValidatedEngine]:
        """Makes one engine of each variant that is ready everywhere, and returns the new ones."""
        each = [member.ready for member in self._members]
        everywhere: Set[str] = set.intersection(*(set(ready) for ready in each)) - set(self._ready)
        new = {precision: _join([ready[precision] for ready in each]) for precision in sorted(everywhere)}
        self._ready.update(new)
        return list(new.values())

    @property
    def ready(self) -> Dict[str, ValidatedEngine]:
        with self._lock:
            return dict(self._ready)

    @property
    def refused(self) -> Dict[str, str]:
        found: Dict[str, str] = {}
        for index, member in enumerate(self._members):
            for precision, reason in member.refused.items():
                found.setdefault(precision, f"GPU {index + 1} of {len(self._members)}: {reason}")
        return found

    @property
    def pending(self) -> List[str]:
        refused = self.refused
        waiting = {precision: None for member in self._members for precision in member.pending}
        return [precision for precision in waiting if precision not in refused]

    def best(self) -> Optional[ValidatedEngine]:
        ready = self.ready
        name = choose(ready, self._wanted)
        return None if name is None else ready[name]

    def close(self) -> None:
        for member in self._members:
            member.close()


def _join(engines: Sequence[ValidatedEngine]) -> ValidatedEngine:
    """One engine for all GPUs; where they differ, its curve is the slower one's."""
    buckets = set.intersection(*(set(engine.curve) for engine in engines))
    curve = {bucket: max(engine.curve[bucket] for engine in engines) for bucket in sorted(buckets)}
    return ValidatedEngine(MultiDeviceExecutor([engine.executor for engine in engines]), curve)
