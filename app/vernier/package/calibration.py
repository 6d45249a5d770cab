"""The calibration cache: scales of activations in TensorRT's text format, with what they were made from.

    calibration.cache         `TRT-…` header, then `tensor: 3c010a14`, the big-endian bits of the float32 scale
    calibration.json          hashes of model and data, method, sample count, tool versions, sha256 of the others
    calibration.weights.npz   the rounded weights, so that reuse gives the same graph without the data

A cache is reused only for the model, tensors and method that it was made for. Two numbers that are
off by a little would build, run and be wrong.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional

import numpy as np

from vernier.errors import BuildError
from vernier.tensors import Array, Arrays

CACHE_NAME = "calibration.cache"
SIDECAR_NAME = "calibration.json"
WEIGHTS_NAME = "calibration.weights.npz"
SIDECAR_VERSION = 1

#: TensorRT's readers look at the algorithm in the header; its number is that of the oldest TensorRT served.
_HEADERS = {"minmax": "TRT-8501-MinMaxCalibration"}
_ESCAPES = (("%", "%25"), ("\n", "%0A"), ("\r", "%0D"))
_DEFAULT_HEADER = "TRT-8501-EntropyCalibration2"


@dataclass(frozen=True)
class StoredWeight:
    """A rounded weight: int8 values, float32 scales along `axis` (or one, of shape ()), a correction or None."""

    values: Array
    scales: Array
    axis: int
    bias_correction: Optional[Array] = None
    method: str = "nearest"


@dataclass(frozen=True)
class Calibration:
    """What a calibration found, and what it was made from.

    scales: value name → INT8 scale. peaks: value name → largest magnitude seen.
    weights: node name → rounded weight; empty when only ranges were kept.
    weight_method: how weights were rounded, as asked for.
    """

    model_sha256: str
    data_sha256: str
    method: str
    samples: int
    scales: Dict[str, float]
    per_tensor_method: Dict[str, str] = field(default_factory=dict)
    peaks: Dict[str, float] = field(default_factory=dict)
    weights: Dict[str, StoredWeight] = field(default_factory=dict)
    weight_method: str = ""
    tools: Dict[str, str] = field(default_factory=dict)


# --- TensorRT's text format -----------------------------------------------------------------------
def format_cache(scales: Mapping[str, float], method: str) -> str:
    """The cache's text. Line breaks and % in names are written as %0A, %0D and %25."""
    lines = [_HEADERS.get(method, _DEFAULT_HEADER)]
    for name in sorted(scales):
        bits = struct.pack(">f", np.float32(scales[name])).hex()
        for plain, escaped in _ESCAPES:
            name = name.replace(plain, escaped)
        lines.append(f"{name}: {bits}")
    return "\n".join(lines) + "\n"


def parse_cache(text: str, where: str) -> Dict[str, float]:
    """Value name → scale. Raises BuildError, with the line, for what is not TensorRT's format."""
    lines = text.split("\n")
    if not lines[0].startswith("TRT-"):
        raise BuildError(f"{where} is no TensorRT calibration cache: its first line should start with 'TRT-'")
    scales: Dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        name, separator, bits = line.rpartition(": ")
        try:
            (scale,) = struct.unpack(">f", bytes.fromhex(bits.strip()))
        except (ValueError, struct.error):
            separator, scale = "", 0.0
        if not separator or not np.isfinite(scale) or scale <= 0:
            raise BuildError(
                f"line {number} of {where} is not of the form 'tensor: 3c010a14' with a positive scale: "
                f"calibrate again"
            )
        for plain, escaped in reversed(_ESCAPES):
            name = name.replace(escaped, plain)
        scales[name] = float(scale)
    return scales


# --- files ----------------------------------------------------------------------------------------
def write_calibration(folder: Path, calibration: Calibration) -> List[Path]:
    """Writes cache, sidecar and (if there are any) weights into `folder`; returns the paths."""
    cache = folder / CACHE_NAME
    cache.write_bytes(format_cache(calibration.scales, calibration.method).encode("utf-8"))
    written = [cache]
    if calibration.weights:
        path = folder / WEIGHTS_NAME
        _save_weights(path, calibration.weights)
        written.append(path)
    sidecar = {
        "sidecar_version": SIDECAR_VERSION,
        "model_sha256": calibration.model_sha256,
        "data_sha256": calibration.data_sha256,
        "method": calibration.method,
        "weight_method": calibration.weight_method,
        "samples": calibration.samples,
        "tools": calibration.tools,
        "files": {path.name: _sha256(path) for path in written},
        "tensors": {
            name: {
                "scale": scale,
                "peak": calibration.peaks.get(name),
                "method": calibration.per_tensor_method.get(name, calibration.method),
            }
            for name, scale in sorted(calibration.scales.items())
        },
    }
    path = folder / SIDECAR_NAME
    path.write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return [cache, path, *written[1:]]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _save_weights(path: Path, weights: Mapping[str, StoredWeight]) -> None:
    """Names go into an array of their own: a member of an archive cannot have every character."""
    arrays: Dict[str, Any] = {
        "names": np.array(json.dumps(list(weights))),
        "methods": np.array(json.dumps([w.method for w in weights.values()])),
        "axes": np.array([w.axis for w in weights.values()], np.int64),
    }
    for index, weight in enumerate(weights.values()):
        arrays[f"{index}.values"] = weight.values
        arrays[f"{index}.scales"] = weight.scales
        if weight.bias_correction is not None:
            arrays[f"{index}.correction"] = weight.bias_correction
    np.savez_compressed(path, **arrays)


def _load_weights(path: Path) -> Dict[str, StoredWeight]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays: Arrays = {name: archive[name] for name in archive.files}
        names, methods = (json.loads(str(arrays[key])) for key in ("names", "methods"))
        return {
            name: StoredWeight(
                arrays[f"{index}.values"],
                arrays[f"{index}.scales"],
                int(arrays["axes"][index]),
                arrays.get(f"{index}.correction"),
                methods[index],
            )
            for index, name in enumerate(names)
        }
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise BuildError(f"cannot read {path}: {error}; calibrate again") from error


def read_calibration(cache: Path) -> Calibration:
    """Reads a cache with its sidecar and weights, which lie beside it, and verifies their hashes.

    Raises:
        BuildError: a file is missing, was changed after it was written, or is not of the format.
    """
    folder = cache if cache.is_dir() else cache.parent
    cache = folder / CACHE_NAME if cache.is_dir() else cache
    sidecar_path = folder / SIDECAR_NAME
    try:
        text = cache.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"cannot read the calibration cache {cache}: {error}") from error
    scales = parse_cache(text, str(cache))
    try:
        sidecar = json.loads(sidecar_path.read_text("utf-8"))
        version, files, tensors = sidecar["sidecar_version"], dict(sidecar["files"]), dict(sidecar["tensors"])
    except FileNotFoundError as error:
        raise BuildError(
            f"{cache} has no {SIDECAR_NAME} beside it, so nobody knows which model it was made for: "
            f"calibrate again, or copy the sidecar too"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{sidecar_path} is no calibration sidecar: {error}; calibrate again") from error
    if version != SIDECAR_VERSION:
        raise BuildError(
            f"{sidecar_path} has version {version}, and this release reads {SIDECAR_VERSION}: calibrate again"
        )
    weights: Dict[str, StoredWeight] = {}
    for name, digest in files.items():
        path = cache if name == CACHE_NAME else folder / Path(str(name)).name
        if not path.is_file():
            raise BuildError(
                f"{path}, which {sidecar_path} lists, is missing: copy it too or calibrate again"
            )
        if _sha256(path) != digest:
            raise BuildError(f"{path} was changed after {sidecar_path} was written: calibrate again")
        if name == WEIGHTS_NAME:
            weights = _load_weights(path)
    try:
        return Calibration(
            model_sha256=str(sidecar["model_sha256"]),
            data_sha256=str(sidecar["data_sha256"]),
            method=str(sidecar["method"]),
            samples=int(sidecar["samples"]),
            scales=scales,
            per_tensor_method={name: str(entry["method"]) for name, entry in tensors.items()},
            peaks={name: float(e["peak"]) for name, e in tensors.items() if e["peak"] is not None},
            weights=weights,
            weight_method=str(sidecar["weight_method"]),
            tools={str(k): str(v) for k, v in sidecar["tools"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BuildError(f"{sidecar_path} is no calibration sidecar: {error}; calibrate again") from error


def check_calibration(
    calibration: Calibration,
    where: Path,
    model_sha256: str,
    tensors: Iterable[str],
    method: Optional[str] = None,
    data_sha256: Optional[str] = None,
) -> None:
    """Raises BuildError, naming both sides, unless the cache was made for exactly this.

    Args:
        tensors: the values that the model needs scales for.
        method, data_sha256: compared only where they are given.
    """
    _same(where, "the model with sha256", calibration.model_sha256, model_sha256, "calibrate this model")
    if method is not None:
        _same(where, "the method", calibration.method, method, "ask for that method or calibrate again")
    if data_sha256 is not None:
        _same(
            where,
            "data with sha256",
            calibration.data_sha256,
            data_sha256,
            "give that data or calibrate again",
        )
    have, want = set(calibration.scales), set(tensors)
    if have != want:
        missing, extra = sorted(want - have), sorted(have - want)
        differences = [f"the model needs '{missing[0]}', which the cache lacks"] if missing else []
        differences += [f"the cache has '{extra[0]}', which the model does not quantize"] if extra else []
        raise BuildError(
            f"{where} holds scales of {len(have)} tensors and the model needs {len(want)} "
            f"({'; '.join(differences)}): calibrate again"
        )


def _same(where: Path, what: str, made_for: str, asked: str, remedy: str) -> None:
    if made_for != asked:
        raise BuildError(f"{where} was made for {what} {made_for}, and this build has {asked}: {remedy}")
