"""Reads all samples of a set once: which are copies, which belong together, and which inputs never change."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from vernier.builder.progress import NoProgress, Progress
from vernier.builder.samples.data import ArraySamples, Samples
from vernier.tensors import Array

_DIGEST_BYTES = 16
_BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class Survey:
    """What a set of samples holds, whatever a model answers to it.

    fingerprints: [samples], a hash of each sample's inputs.
    groups: [samples], numbers from 0; samples with the same number are copies of one another, or belong
        together by the group key. As many as samples where all are independent.
    constant: inputs that are the same in every sample.
    flat: float inputs of which all samples hold one single number, so that they span no range.
    inputs, floats: all inputs, and those of floats.
    """

    fingerprints: Array
    groups: Array
    constant: tuple[str, ...]
    flat: tuple[str, ...]
    inputs: tuple[str, ...]
    floats: tuple[str, ...]

    @property
    def samples(self) -> int:
        return len(self.fingerprints)

    @property
    def distinct(self) -> int:
        return len(np.unique(self.fingerprints))

    @property
    def independent(self) -> int:
        return len(np.unique(self.groups))


def survey(samples: Samples, keys: Array | None = None, progress: Progress | None = None) -> Survey:
    """Reads `samples` once.

    Args:
        keys: [samples] or [samples, rows of one sample], equal where samples belong together.
    """
    digests: list[bytes] = []
    constant = dict.fromkeys(samples.names, True)
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    first = samples.take([0])
    with (progress or NoProgress()).task("weighing the data", len(samples)) as advance:
        row_bytes = sum(array.nbytes for array in first.values())
        for batch in samples.batches(max(1, _BATCH_BYTES // max(1, row_bytes))):
            for name, array in batch.items():
                constant[name] = constant[name] and bool((array == first[name]).all())
                if array.dtype.kind == "f" and array.size:
                    lows[name] = min(lows.get(name, np.inf), float(array.min()))
                    highs[name] = max(highs.get(name, -np.inf), float(array.max()))
            rows = np.concatenate([_bytes_of_rows(batch[name]) for name in samples.names], axis=1)
            digests += [hashlib.blake2b(row, digest_size=_DIGEST_BYTES).digest() for row in rows]
            advance(len(rows))
    fingerprints = np.array(digests, f"S{_DIGEST_BYTES}")
    return Survey(
        fingerprints,
        join_groups(fingerprints, keys),
        tuple(name for name, same in constant.items() if same),
        tuple(name for name in lows if lows[name] == highs[name]),
        samples.names,
        tuple(lows),
    )


def surveyed(samples: ArraySamples, keys: Array | None, progress: Progress) -> Survey:
    """`survey`, and tells the samples which of them belong together."""
    found = survey(samples, keys, progress)
    if found.independent < len(samples):
        samples.groups = found.groups
    return found


def join_groups(fingerprints: Array, keys: Array | None) -> Array:
    """[samples] group numbers: samples that share a fingerprint or a key, directly or through others, are one group."""
    columns = [np.unique(fingerprints, return_inverse=True)[1].reshape(-1)]
    if keys is not None:
        numbers = np.unique(keys, return_inverse=True)[1].reshape(len(fingerprints), -1)
        columns += [numbers[:, column] for column in range(numbers.shape[1])]
    # Keys of all columns are one vocabulary; copies are another.
    vocabularies = [columns[:1], columns[1:]]
    labels = np.arange(len(fingerprints))
    while True:
        before = labels
        for vocabulary in vocabularies:
            if not vocabulary:
                continue
            least = np.full(max(int(column.max()) for column in vocabulary) + 1, len(labels))
            for column in vocabulary:
                np.minimum.at(least, column, labels)
            labels = np.min([labels, *(least[column] for column in vocabulary)], axis=0)
        if np.array_equal(before, labels):
            return np.unique(labels, return_inverse=True)[1].reshape(-1)


def independent(samples: Samples) -> int:
    """The number of independent samples: copies, and what belongs together by the group key, count once."""
    return len(samples) if samples.groups is None else len(np.unique(samples.groups))


def _bytes_of_rows(array: Array) -> Array:
    """[samples, bytes]"""
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
