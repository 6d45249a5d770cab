"""The requests of the load: rows of real data, each as long as a client would send it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vernier.builder.samples.data import check_samples, open_data
from vernier.errors import BuildError
from vernier.package.golden import load_golden
from vernier.package.integrity import resolve_inside
from vernier.package.manifest import Manifest
from vernier.tensors import Array, Arrays

#: Distinct requests; a load sends them again and again.
_MOST = 512


def make_requests(package: Path, manifest: Manifest, data: str | None, rows: int) -> list[Arrays]:
    """Inputs of `rows` rows each.

    Args:
        data: where samples come from (see `vernier.builder.samples.sources`); None takes the package's golden vectors.

    Raises:
        BuildError: there are no samples, or they do not fit the model.
    """
    if data is not None:
        specs = manifest.input_specs()
        names = [spec.name for spec in specs]
        samples = check_samples(open_data(data, names), data, specs).take(range(_count(data, names)))
    elif manifest.golden is not None:
        samples = load_golden(resolve_inside(package, manifest.golden)).inputs
    else:
        raise BuildError(f"{package} has no golden vectors to make requests of: give --data")
    if manifest.batching.kind == "none":
        if rows != 1:
            raise BuildError(f"a request to '{manifest.name}' has no rows to count: leave --rows out")
        count = len(next(iter(samples.values())))
        return [{name: np.asarray(array[i]) for name, array in samples.items()} for i in range(count)]
    count = len(next(iter(samples.values())))
    made = []
    for start in range(min(_MOST, count)):
        index = (np.arange(rows) + start * rows) % count
        made.append(_cropped({name: array[index] for name, array in samples.items()}, manifest))
    return made


def _count(data: str, names: list[str]) -> int:
    return min(_MOST, len(open_data(data, names)[names[0]]))


def _cropped(inputs: Arrays, manifest: Manifest) -> Arrays:
    """The inputs without the padding that lengths or a mask tell of."""
    specs = {spec.name: spec for spec in manifest.input_specs()}
    for rule in manifest.sequence:
        longest = _longest(inputs, rule.lengths_input, rule.mask_input)
        if longest is None:
            continue
        longest = max(longest, manifest.dims[rule.dim].min)
        for name, array in inputs.items():
            if rule.dim in specs[name].shape:
                index = [slice(None)] * array.ndim
                index[specs[name].shape.index(rule.dim)] = slice(longest)
                inputs[name] = array[tuple(index)]
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}


def _longest(inputs: Arrays, lengths: str | None, mask: str | None) -> int | None:
    if lengths in inputs:
        return int(inputs[lengths].max())
    if mask in inputs:
        return _last_real(inputs[mask])
    return None


def _last_real(mask: Array) -> int:
    real = np.flatnonzero((mask != 0).any(axis=0))
    return int(real[-1]) + 1 if real.size else 1
