"""Triton's statistics of each model version, out of the metric families of the whole service."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from vernier.border.catalogue import ServedModel
from vernier.exposition_merge import Family

_STAGES = ("input", "infer", "output")


class _Samples:
    """The samples of one model version by name, summed over the labels that are not looked at."""

    def __init__(self) -> None:
        self.totals: defaultdict[str, float] = defaultdict(float)
        self.buckets: defaultdict[int, dict[str, float]] = defaultdict(dict)

    def add(self, name: str, labels: Mapping[str, str], value: float) -> None:
        self.totals[name] += value
        if "bucket" in labels:
            values, stage = self.buckets[int(labels["bucket"])], labels.get("stage", "")
            values[stage] = values.get(stage, 0.0) + value

    def count(self, name: str) -> int:
        return int(self.totals[name])


def _duration(count: int, us: float = 0.0) -> dict[str, int]:
    return {"count": count, "ns": int(us * 1e3)}


def statistics(families: Iterable[Family], models: Iterable[ServedModel]) -> list[dict[str, Any]]:
    """One entry for each model, in their order. Failed requests are counted; how long they took is not known (0)."""
    found: defaultdict[tuple[str, str], _Samples] = defaultdict(_Samples)
    for _, _, _, samples in families:
        for name, labels, value in samples:
            if "model" in labels and "version" in labels:
                found[labels["model"], labels["version"]].add(name, labels, value)
    return [_entry(model, found[model.name, model.version]) for model in models]


def _entry(model: ServedModel, samples: _Samples) -> dict[str, Any]:
    count, totals = samples.count, samples.totals
    computed = count("vernier_queue_duration_seconds_count")
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": int(totals["vernier_last_execution_timestamp_seconds"] * 1e3),
        "inference_count": count("nv_inference_count"),
        "execution_count": count("nv_inference_exec_count"),
        "inference_stats": {
            "success": _duration(
                count("nv_inference_request_success"), totals["nv_inference_request_duration_us"]
            ),
            "fail": _duration(count("nv_inference_request_failure")),
            "queue": _duration(computed, totals["nv_inference_queue_duration_us"]),
            **{
                f"compute_{stage}": _duration(computed, totals[f"nv_inference_compute_{stage}_duration_us"])
                for stage in _STAGES
            },
            "cache_hit": _duration(0),
            "cache_miss": _duration(0),
        },
        "batch_stats": [
            {
                "batch_size": bucket,
                **{
                    f"compute_{stage}": _duration(int(values.get("", 0)), values.get(stage, 0.0) * 1e6)
                    for stage in _STAGES
                },
            }
            for bucket, values in sorted(samples.buckets.items())
        ],
        "memory_usage": [],
        "response_stats": {},
    }
