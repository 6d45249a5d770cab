"""Golden vectors: inputs with the FP32 variant's outputs, from which every engine is tested where it loads."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from vernier.errors import PackageError
from vernier.package.integrity import resolve_inside
from vernier.package.manifest import Manifest
from vernier.tensors import Arrays

_INPUT = "input:"
_OUTPUT = "output:"


@dataclass(frozen=True)
class GoldenVectors:
    """Arrays by tensor name; the first axis of each is the sample."""

    inputs: Arrays
    outputs: Arrays

    @property
    def samples(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])


def save_golden(path: Path, golden: GoldenVectors) -> None:
    arrays: Dict[str, Any] = {
        **{_INPUT + name: array for name, array in golden.inputs.items()},
        **{_OUTPUT + name: array for name, array in golden.outputs.items()},
    }
    np.savez_compressed(path, **arrays)


def golden_of(package: Path, manifest: Manifest) -> Optional[GoldenVectors]:
    """The golden vectors of a package; None when it has none. Raises PackageError."""
    return load_golden(resolve_inside(package, manifest.golden)) if manifest.golden else None


def load_golden(path: Path) -> GoldenVectors:
    """Reads golden vectors without pickle. Raises PackageError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise PackageError(
            f"cannot read the golden vectors {path}: {error}; build the package again"
        ) from error
    inputs = {n[len(_INPUT) :]: a for n, a in arrays.items() if n.startswith(_INPUT)}
    outputs = {n[len(_OUTPUT) :]: a for n, a in arrays.items() if n.startswith(_OUTPUT)}
    if not inputs or not outputs:
        raise PackageError(f"{path} holds no golden vectors; build the package again")
    return GoldenVectors(inputs, outputs)
