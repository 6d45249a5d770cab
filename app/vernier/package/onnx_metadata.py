"""Reads a model's `metadata_props` without the onnx package, which a serving host does not have.

Only the outermost level of the protobuf message is walked; graph and weights are skipped by their
length, so a file of any size costs a few reads. Field numbers are those of onnx.proto: ModelProto
has metadata_props as 14, StringStringEntryProto has key as 1 and value as 2.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Dict, Iterator, List, Tuple, Union

from vernier.errors import PackageError

#: Names of nodes (a JSON list) that must stay FP32 although the builder's flags allow less.
FP32_NODES = "vernier.fp32_nodes"

_METADATA_FIELD = 14
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

Buffer = Union[bytes, mmap.mmap]


def _varint(data: Buffer, at: int) -> Tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _fields(data: Buffer) -> Iterator[Tuple[int, int, int]]:
    """Yields (field number, start, end) of each length-delimited field; the others are stepped over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _LENGTH:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it is truncated")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} is unknown")


def _metadata(data: Buffer) -> Dict[str, str]:
    found: Dict[str, str] = {}
    for number, start, end in _fields(data):
        if number == _METADATA_FIELD:
            entry = data[start:end]
            parts = {n: entry[a:b].decode("utf-8") for n, a, b in _fields(entry)}
            found[parts.get(1, "")] = parts.get(2, "")
    return found


def model_metadata(model: Union[Path, bytes]) -> Dict[str, str]:
    """Key → value of an ONNX model's metadata. Raises PackageError when it is no ONNX file."""
    where = model if isinstance(model, Path) else "the model"
    try:
        if isinstance(model, bytes):
            return _metadata(model)
        with model.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _metadata(data)
    except (OSError, ValueError, IndexError) as error:
        raise PackageError(f"{where} is not a readable ONNX file: {error}") from error


def fp32_nodes(model: Union[Path, bytes]) -> List[str]:
    """The nodes that a weakly typed build must pin to FP32. Raises PackageError."""
    text = model_metadata(model).get(FP32_NODES, "")
    if not text:
        return []
    try:
        names = json.loads(text)
    except ValueError as error:
        raise PackageError(f"the model's '{FP32_NODES}' is not a JSON list: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PackageError(f"the model's '{FP32_NODES}' is not a JSON list of names")
    return names
