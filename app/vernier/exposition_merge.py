"""One exposition from the registries of several processes.

Counters and histograms are summed. Of a gauge the largest value counts, since one process alone knows it, except of
gauges that each process has a share of. What a process tells of itself (memory, processor time) gets a label with the
process's name; which precision is active gets a label with the number of the engine process where there are several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

#: Families as they travel: (name, type, documentation, [(sample name, labels, value)]).
Family = Sequence[Any]

_SHARED_GAUGES = frozenset(
    {
        "vernier_inflight_requests",
        "vernier_connections",
        "vernier_queue_depth",
        "vernier_slots",
        "nv_inference_pending_request_count",
    }
)
_OF_THE_DEVICE = frozenset({"vernier_precision_active"})
_COUNTED = ("counter", "histogram", "unknown", "untyped")
_OF_THE_PROCESS = ("process_", "python_")
ADMITTED, ENDED = "vernier_requests_admitted_total", "vernier_requests_ended_total"


def families_of(registry: CollectorRegistry) -> list[Family]:
    return [
        (
            family.name,
            family.type,
            family.documentation,
            [(sample.name, sample.labels, sample.value) for sample in family.samples],
        )
        for family in registry.collect()
    ]


class Totals:
    """The merged families of processes."""

    def __init__(self) -> None:
        self._heads: dict[str, tuple[str, str]] = {}
        self._samples: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}

    def add(self, process: str, families: Iterable[Family], device: str | None = None) -> None:
        """Adds what a process tells now.

        Args:
            device: the number of an engine process, if there are several.
        """
        for name, kind, text, samples in families:
            added = {}
            if name.startswith(_OF_THE_PROCESS):
                added["process"] = process
            elif device is not None and name in _OF_THE_DEVICE:
                added["device"] = device
            for sample, labels, value in samples:
                self._add(name, kind, text, sample, {**labels, **added}, value)

    def add_ended(self, families: Iterable[Family]) -> None:
        """Adds what a process had told before it ended: what has been counted stays counted, and requests that had been
        admitted and had not ended have been cancelled with it."""
        left: dict[tuple[str, str], float] = {}  # by model and version
        for name, kind, text, samples in families:
            if kind not in _COUNTED or name.startswith(_OF_THE_PROCESS):
                continue
            for sample, labels, value in samples:
                self._add(name, kind, text, sample, labels, value)
                if sample in (ADMITTED, ENDED):
                    key = labels["model"], labels["version"]
                    left[key] = left.get(key, 0.0) + (value if sample == ADMITTED else -value)
        for (model, version), count in left.items():
            if count > 0:
                cancelled = {"model": model, "version": version, "outcome": "cancelled"}
                family, text = ENDED.removesuffix("_total"), "Admitted requests by how they ended."
                self._add(family, "counter", text, ENDED, cancelled, count)

    def count(self, name: str, text: str, labels: Mapping[str, str], value: float) -> None:
        """Adds a counter of the supervisor's own, named without `_total`."""
        self._add(name, "counter", text, f"{name}_total", labels, value)

    def include(self, other: Totals) -> None:
        """Adds what other totals hold."""
        for name, samples in other._samples.items():
            kind, text = other._heads[name]
            for (sample, labels), value in samples.items():
                self._add(name, kind, text, sample, dict(labels), value)

    def _add(
        self, name: str, kind: str, text: str, sample: str, labels: Mapping[str, str], value: float
    ) -> None:
        self._heads.setdefault(name, (kind, text))
        samples = self._samples.setdefault(name, {})
        key = sample, tuple(sorted(labels.items()))
        known = samples.get(key)
        if known is None:
            samples[key] = value
        elif kind == "gauge" and name not in _SHARED_GAUGES:
            samples[key] = max(known, value)
        else:
            samples[key] = known + value

    def families(self) -> list[Family]:
        """As they travel."""
        return [
            (name, *self._heads[name], [(sample, dict(labels), v) for (sample, labels), v in samples.items()])
            for name, samples in self._samples.items()
        ]

    def by_model(self) -> dict[str, dict[str, int]]:
        """Model and version → `admitted`, and requests by outcome."""
        found: dict[str, dict[str, int]] = {}
        for samples in self._samples.values():
            for (sample, labels), value in samples.items():
                if sample not in (ADMITTED, ENDED):
                    continue
                named = dict(labels)
                totals = found.setdefault(f"{named['model']}/{named['version']}", {})
                totals["admitted" if sample == ADMITTED else named["outcome"]] = int(value)
        return found


class _Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for name, kind, text, samples in self._families:
            family = Metric(name, text, kind)
            for sample, labels, value in samples:
                family.add_sample(sample, labels, value)
            yield family


def render(families: Iterable[Family], accept: str) -> tuple[bytes, str]:
    """The body and the content type that a scraper asks for by its Accept header."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
