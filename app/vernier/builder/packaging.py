"""Puts a package together in its temporary folder and makes it visible in one step."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from vernier.builder.evaluate import Evaluator
from vernier.builder.graphs.prepare import PreparedModel
from vernier.builder.graphs.probe import Probe, open_session
from vernier.builder.samples.data import ArraySamples, Samples, Subset
from vernier.errors import BuildError
from vernier.package.golden import GoldenVectors, save_golden
from vernier.package.integrity import entries_of, list_versions, publish
from vernier.package.manifest import (
    MANIFEST_NAME,
    NAME_PATTERN,
    FileEntry,
    Manifest,
    TensorEntry,
    dump_manifest,
)
from vernier.tensors import Arrays, TensorSpec

GOLDEN_NAME = "golden.npz"
_LEAST_GOLDEN, _MOST_GOLDEN = 16, 64
#: Fewer golden samples are kept (but at least 16) when inputs and outputs would take more.
_GOLDEN_BYTES = 8 << 20
_MOST_TRIES = 100


def check_name(name: str) -> None:
    """Raises BuildError for a name that cannot be a folder and a part of an URL."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BuildError(
            f"'{name}' cannot be a model's name: use letters, digits, '_', '.' and '-', a letter or digit first"
        )


def golden_indices(samples: Samples, outputs: Arrays, batch_size: int | None) -> list[int]:
    """Which samples become golden vectors: 16 to 64 evenly spread ones, whole batches where the batch is fixed.

    Args:
        outputs: FP32's answers to some of them, for their size.
    """
    first = samples.take([0])
    one = sum(a.nbytes for a in first.values()) + sum(a.nbytes // len(a) for a in outputs.values())
    count = min(len(samples), max(_LEAST_GOLDEN, min(_MOST_GOLDEN, _GOLDEN_BYTES // max(1, one))))
    if batch_size is not None and count >= batch_size:
        count -= count % batch_size
    return [int(i) for i in np.linspace(0, len(samples) - 1, count).round()]


def write_golden(folder: Path, model: ModelProto, samples: Samples, batch_size: int | None) -> GoldenVectors:
    """Stores some samples with FP32's answers to exactly them, in this order."""
    outputs = Evaluator(model).run(Subset(samples, np.arange(min(len(samples), batch_size or 1))))
    chosen = Subset(samples, np.asarray(golden_indices(samples, outputs, batch_size)))
    golden = GoldenVectors(chosen.take(range(len(chosen))), Evaluator(model).run(chosen))
    save_golden(folder / GOLDEN_NAME, golden)
    return golden


def made_up_samples(prepared: PreparedModel, work: Path, count: int = _LEAST_GOLDEN) -> Samples:
    """Random inputs at the usual sizes, for a package that is built without any data."""
    probe = Probe(open_session(prepared.model, work), prepared.inputs)
    sizes = {name: size.opt for name, size in prepared.dims.items()}
    if prepared.batching.dim is not None:
        return ArraySamples(probe.inputs(sizes | {prepared.batching.dim: count}))
    each = [probe.inputs(sizes, seed) for seed in range(count)]
    join = np.stack if prepared.batching.kind == "none" else np.concatenate
    return ArraySamples({spec.name: join([one[spec.name] for one in each]) for spec in prepared.inputs})


def tensor_entries(specs: Sequence[TensorSpec]) -> list[TensorEntry]:
    return [TensorEntry(name=s.name, dtype=s.dtype, shape=list(s.shape)) for s in specs]


def now_text() -> str:
    """UTC to the second, as in `2026-01-31T12:00:00Z`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def publish_numbered(
    staged: Path, model_dir: Path, make: Callable[[int, dict[str, FileEntry]], Manifest]
) -> tuple[Path, Manifest]:
    """Gives the package the next free version, writes its manifest and publishes it.

    Another builder may take the number meanwhile; then the next one is tried.

    Args:
        make: the manifest for a version and the package's files.
    """
    found = entries_of(staged, skip=[MANIFEST_NAME])
    files = {name: entry for name, entry in found.items() if not name.startswith("plans/")}
    for _ in range(_MOST_TRIES):
        number = max(list_versions(model_dir), default=0) + 1
        manifest = make(number, files)
        (staged / MANIFEST_NAME).write_text(dump_manifest(manifest), "utf-8")
        try:
            return publish(staged, model_dir, number), manifest
        except FileExistsError:
            continue
    raise BuildError(
        f"other builders kept taking every version under {model_dir}: build again when they are done"
    )
