"""One variant on several devices: an executor on each, and one that stands for all of them.

A worker keeps to one device and takes the slots of every variant from that device's part.
"""

from __future__ import annotations

from typing import Sequence, Tuple

from vernier.engine.base import Executor, Slot


class MultiDeviceExecutor(Executor):
    """See `vernier.engine.base.Executor`. `parts` are of one variant, each on a device of its own, loaded already."""

    def __init__(self, parts: Sequence[Executor]) -> None:
        first = parts[0]
        self._parts = tuple(parts)
        self.precision = first.precision
        self.runtime = first.runtime
        self.device = ",".join(part.device for part in parts)
        self.inputs = first.inputs
        self.outputs = first.outputs
        self.engine_bytes = sum(part.engine_bytes for part in parts)
        self.load_seconds = sum(part.load_seconds for part in parts)
        self.exact_batch = first.exact_batch

    @property
    def parts(self) -> Sequence[Executor]:
        return self._parts

    def open_slot(self) -> Slot:
        """On the first device, for callers that keep to none, such as the precision monitor."""
        return self._parts[0].open_slot()

    @property
    def launches(self) -> Tuple[int, int]:
        counts = [part.launches for part in self._parts]
        return sum(graph for graph, _ in counts), sum(plain for _, plain in counts)

    def close(self) -> None:
        for part in self._parts:
            part.close()
