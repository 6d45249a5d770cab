"""Calibration and evaluation samples: checked against the model, read in batches, never held whole."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol, cast

import numpy as np

from vernier.builder.samples.sources import open_source
from vernier.builder.samples.stored import StoredArray
from vernier.errors import BuildError
from vernier.tensors import Array, Arrays, TensorSpec, numpy_dtype, shape_text

_CHUNK_BYTES = 8 << 20
_SPLIT_SEED = 20_000


class Samples(Protocol):
    """Samples of a model's inputs; the first axis of every array counts them.

    names: the inputs, in the model's order.
    sha256: of the contents (names, dtypes, shapes, values), whatever file they came in.
    labels: one per sample, or None.
    groups: one number per sample, equal where samples are not independent of one another; None where all are.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def sha256(self) -> str: ...
    @property
    def labels(self) -> Array | None: ...
    @property
    def groups(self) -> Array | None: ...
    def __len__(self) -> int: ...
    def batches(self, rows: int) -> Iterator[Arrays]:
        """All samples in order, `rows` at a time, the last batch shorter. Every call starts anew."""
        ...

    def take(self, indices: Sequence[int]) -> Arrays:
        """The samples at `indices`, in that order."""
        ...


class ArraySamples:
    """Samples in arrays, which may lie on disk; `dtypes` are what the model takes."""

    def __init__(
        self,
        arrays: Mapping[str, Array],
        labels: Array | None = None,
        dtypes: Mapping[str, np.dtype[np.generic]] | None = None,
    ) -> None:
        self._arrays = dict(arrays)
        self._dtypes = dict(dtypes or {name: array.dtype for name, array in arrays.items()})
        self.names = tuple(self._arrays)
        self.labels = labels
        self.groups: Array | None = None

    def __len__(self) -> int:
        return int(next(iter(self._arrays.values())).shape[0])

    def _rows(self, index: slice | Array) -> Arrays:
        found = {n: np.array(a[index], dtype=self._dtypes[n], order="C") for n, a in self._arrays.items()}
        for array in self._arrays.values():
            _let_go(array)
        return found

    def batches(self, rows: int) -> Iterator[Arrays]:
        for start in range(0, len(self), rows):
            yield self._rows(slice(start, start + rows))

    def take(self, indices: Sequence[int]) -> Arrays:
        return self._rows(np.asarray(indices, np.int64))

    def grouped(self, rows: Mapping[str, int | None]) -> ArraySamples:
        """The same data with so many rows of each array to a sample; None leaves an array as it is."""
        sizes = [size for size in rows.values() if size is not None]
        if not sizes:
            return self
        if max(sizes) > len(self):
            raise BuildError(f"one run takes {max(sizes)} samples, and the data has {len(self)}: give more")
        count = min(len(self) // (size or 1) for size in rows.values())
        arrays = {n: _group(a, rows[n], count) for n, a in self._arrays.items()}
        labels = (
            None
            if self.labels is None
            else _group(self.labels, max(sizes) if max(sizes) > 1 else None, count)
        )
        return ArraySamples(arrays, labels, self._dtypes)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, array in self._arrays.items():
            digest.update(f"{name}\0{self._dtypes[name]}\0{list(array.shape)}\0".encode())
            for chunk in _chunks(array):
                digest.update(np.array(chunk, dtype=self._dtypes[name], order="C").tobytes())
        if self.labels is not None:
            digest.update(f"\0{self.labels.dtype}\0{list(self.labels.shape)}\0".encode())
            digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


class Subset:
    """Some samples of another set, by index."""

    def __init__(self, samples: Samples, indices: Array) -> None:
        self.source = samples
        self.indices = np.asarray(indices, np.int64)
        self.names = samples.names
        self.labels = None if samples.labels is None else samples.labels[self.indices]
        self.groups = None if samples.groups is None else samples.groups[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, rows: int) -> Iterator[Arrays]:
        for start in range(0, len(self), rows):
            yield self.source.take(self.indices[start : start + rows].tolist())

    def take(self, indices: Sequence[int]) -> Arrays:
        return self.source.take(self.indices[np.asarray(indices, np.int64)].tolist())

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.sha256.encode() + self.indices.tobytes()).hexdigest()


def positions(samples: Samples, whole: Samples) -> Array:
    """Where in `whole` the samples of one of its subsets, or of a subset of that, stand."""
    if samples is whole:
        return np.arange(len(whole))
    if not isinstance(samples, Subset):
        raise ValueError("not a subset")
    return positions(samples.source, whole)[samples.indices]


def split(samples: Samples, first: int) -> tuple[Samples, Samples]:
    """Two disjoint parts, `first` samples in the first.

    Drawn at random with a fixed seed, because files are often sorted by label, and kept in order.
    """
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(samples))
    return Subset(samples, np.sort(order[:first])), Subset(samples, np.sort(order[first:]))


def split_apart(samples: Samples, first: int) -> tuple[Samples, Samples]:
    """`split` that keeps samples of one group together: about `first` samples are in the first part.

    A single group is split nevertheless: there is nothing else to choose on.
    """
    groups = samples.groups
    if groups is None or len(np.unique(groups)) < 2:
        return split(samples, first)
    names, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(names))
    ends = np.cumsum(sizes[order])
    taken = 1 + int(np.argmin(np.abs(ends[:-1] - first)))
    chosen = np.isin(groups, names[order[:taken]])
    return Subset(samples, np.flatnonzero(chosen)), Subset(samples, np.flatnonzero(~chosen))


def joined_groups(*parts: Samples) -> Array | None:
    """The groups of several parts of one set, one below the other."""
    groups = [part.groups for part in parts if part.groups is not None]
    return np.concatenate(groups) if groups else None


def first_and_rest(samples: Samples, first: int) -> tuple[Samples, Samples | None]:
    """The first so many, and the others; None where there are none."""
    if first >= len(samples):
        return samples, None
    return Subset(samples, np.arange(first)), Subset(samples, np.arange(first, len(samples)))


def limit(samples: Samples, most: int) -> Samples:
    """At most `most` samples, drawn as `split` does."""
    return samples if len(samples) <= most else split(samples, most)[0]


def load_samples(
    source: str,
    specs: Sequence[TensorSpec],
    label_key: str = "label",
    need_labels: bool = False,
) -> Samples:
    """Opens and checks data for a model whose inputs are `specs`; see `open_source` for the sources.

    Raises:
        BuildError: an input is missing, has another shape or dtype, counts differ, a value is not
            finite, there are no samples, or labels are needed and missing.
    """
    return check_samples(
        open_data(source, [s.name for s in specs], label_key), source, specs, label_key, need_labels
    )


def open_data(
    source: str, inputs: Sequence[str], label_key: str = "label", group_key: str | None = None
) -> Arrays:
    """The arrays of `source` before anything is known about the model's shapes."""
    return open_source(source, [*inputs, label_key, *([group_key] if group_key else [])])


def check_samples(
    arrays: Mapping[str, Array],
    source: str,
    specs: Sequence[TensorSpec],
    label_key: str = "label",
    need_labels: bool = False,
) -> ArraySamples:
    """`load_samples` for data that is open already."""
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        raise BuildError(
            f"the data '{source}' has no array for the input{'s' if len(missing) > 1 else ''} {', '.join(missing)} "
            f"(it has {', '.join(arrays) or 'nothing'}): store one array per model input, samples first"
        )
    counts = {name: arrays[name].shape[0] for name in [s.name for s in specs]}
    labels = None if label_key in counts else arrays.get(label_key)
    if need_labels and labels is None:
        raise BuildError(
            f"the data '{source}' has no labels under '{label_key}': add them, or name their array with --label-key"
        )
    if labels is not None:
        counts[label_key] = labels.shape[0]
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise BuildError(
            f"the arrays of '{source}' differ in their number of samples ({shown}): make them equal"
        )
    if not all(counts.values()):
        raise BuildError(f"the data '{source}' holds no samples: give at least a few dozen")
    dims: dict[str, int] = {}
    for spec in specs:
        _check_shape(source, spec, arrays[spec.name], dims)
        _check_values(source, spec, arrays[spec.name])
    chosen = {spec.name: arrays[spec.name] for spec in specs}
    dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in specs}
    return ArraySamples(chosen, None if labels is None else np.asarray(labels), dtypes)


def _check_shape(source: str, spec: TensorSpec, array: Array, dims: dict[str, int]) -> None:
    """The shape of a sample is the input's without its first dimension, or, for models without a batch, whole."""
    own = array.shape[1:]
    expected = spec.shape[1:] if array.ndim == len(spec.shape) else spec.shape
    fits = len(own) == len(expected)
    for size, dim in zip(own, expected, strict=False):
        fits = fits and size == (dims.setdefault(dim, size) if isinstance(dim, str) else dim)
    if not fits or 0 in own:
        wanted = TensorSpec(spec.name, spec.dtype, ("samples", *spec.shape[1:])).describe_shape()
        raise BuildError(
            f"'{spec.name}' in the data '{source}' has shape {shape_text(array.shape)}, but the model takes "
            f"{spec.describe_shape()}: store it as {wanted}"
        )


def _check_values(source: str, spec: TensorSpec, array: Array) -> None:
    """Dtypes may widen or narrow as long as no value changes its meaning; whole numbers become floats without loss."""
    wanted = numpy_dtype(spec.dtype)
    kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b"}
    whole = wanted.kind == "f" and array.dtype.kind in "iu" and np.can_cast(array.dtype, wanted, "safe")
    if array.dtype.kind not in kinds[wanted.kind] and not whole:
        raise BuildError(
            f"'{spec.name}' in the data '{source}' holds {array.dtype.name}, but the model takes {spec.dtype}: "
            f"convert it before storing"
        )
    for chunk in _chunks(array):
        if wanted.kind == "f" and not np.isfinite(chunk).all():
            raise BuildError(
                f"'{spec.name}' in the data '{source}' holds NaN or infinity: remove those samples"
            )
        if wanted.kind in "iu" and chunk.size:
            limits = np.iinfo(wanted)
            if int(chunk.min()) < limits.min or int(chunk.max()) > limits.max:
                raise BuildError(
                    f"'{spec.name}' in the data '{source}' holds numbers that {spec.dtype} cannot"
                )


def _group(array: Array, rows: int | None, count: int) -> Array:
    if rows is not None and isinstance(array, StoredArray):
        return cast(Array, array.grouped(rows, count))
    return array[:count] if rows is None else array[: count * rows].reshape(count, rows, *array.shape[1:])


def whole_number_notes(arrays: Mapping[str, Array], source: str, specs: Sequence[TensorSpec]) -> list[str]:
    """What should be said where whole numbers are given for an input of floats: their scale may be another one."""
    return [
        f"'{spec.name}' in the data '{source}' holds {arrays[spec.name].dtype.name}, which the model gets as the same "
        f"numbers in {spec.dtype}: nothing is scaled"
        for spec in specs
        if numpy_dtype(spec.dtype).kind == "f" and arrays[spec.name].dtype.kind in "iu"
    ]


def _chunks(array: Array) -> Iterator[Array]:
    """Slices along the first axis of some megabytes each."""
    per_row = max(1, array.nbytes // max(1, array.shape[0]))
    step = max(1, _CHUNK_BYTES // per_row)
    for start in range(0, array.shape[0], step):
        yield array[start : start + step]
        _let_go(array)


def _let_go(array: Array) -> None:
    """Of a mapped file, gives back the pages that were read: they would count as this process's memory."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def one_request_each(samples: ArraySamples, specs: Sequence[TensorSpec]) -> ArraySamples:
    """For a model whose requests run alone: every sample becomes a whole request, one axis more than the input.

    Data stored by rows is cut into requests of as many rows as the input's first dimension fixes, one
    row where it is dynamic; rows left over are dropped.
    """
    return samples.grouped({s.name: _rows_of_a_request(samples, s) for s in specs})


def _rows_of_a_request(samples: ArraySamples, spec: TensorSpec) -> int | None:
    if samples.take([0])[spec.name].ndim == len(spec.shape) + 1:
        return None
    return spec.shape[0] if isinstance(spec.shape[0], int) else 1


def feeds(samples: Samples, specs: Sequence[TensorSpec], rows: int) -> Iterator[tuple[Arrays, int]]:
    """What a model can be run on, batch by batch, with the number of real samples in each.

    A dynamic first dimension gets up to `rows` samples. A fixed one gets batches of its own size, the
    last filled up with its last sample. Inputs with one dimension fewer than the data have no batch
    axis: they get one sample at a time.
    """
    if has_no_batch_axis(samples, specs):
        for batch in samples.batches(1):
            yield {name: np.asarray(array[0]) for name, array in batch.items()}, 1
        return
    fixed = fixed_batch(samples, specs)
    for batch in samples.batches(fixed or rows):
        count = len(next(iter(batch.values())))
        if fixed is not None and count < fixed:
            filler = np.minimum(np.arange(fixed), count - 1)
            batch = {name: array[filler] for name, array in batch.items()}
        yield batch, count


def has_no_batch_axis(samples: Samples, specs: Sequence[TensorSpec]) -> bool:
    """Whether the data has an axis for the samples that the model's inputs lack."""
    first = samples.take([0])
    return any(first[s.name].ndim == len(s.shape) + 1 for s in specs)


def fixed_batch(samples: Samples, specs: Sequence[TensorSpec]) -> int | None:
    """The number of samples that one execution takes, where the model fixes it."""
    if has_no_batch_axis(samples, specs):
        return None
    return next((s.shape[0] for s in specs if s.shape and isinstance(s.shape[0], int)), None)


def rows_of(outputs: Sequence[Array], count: int, no_batch_axis: bool) -> list[Array]:
    """The answers to the real samples of one batch of `feeds`, samples first."""
    return [o[None] if no_batch_axis else o[:count] for o in outputs]
