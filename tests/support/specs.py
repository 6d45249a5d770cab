"""Manifests and signatures for tests that need no files."""

from __future__ import annotations

from typing import Any

from vernier.border.signature import Signature
from vernier.package.manifest import Manifest

HASH = "0" * 64


def make_manifest(**changes: Any) -> Manifest:
    """A valid manifest of a ranker with inputs `dense` [batch, 3] and `ids` [batch, 2]."""
    fields: dict[str, Any] = {
        "name": "ranker",
        "version": 1,
        "created": "2026-01-01T00:00:00Z",
        "source_sha256": HASH,
        "inputs": [
            {"name": "dense", "dtype": "float32", "shape": ["batch", 3]},
            {"name": "ids", "dtype": "int64", "shape": ["batch", 2]},
        ],
        "outputs": [{"name": "score", "dtype": "float32", "shape": ["batch", 1]}],
        "dims": {"batch": {"min": 1, "opt": 8, "max": 16}},
        "batching": {"kind": "dynamic", "dim": "batch", "buckets": [1, 8, 16]},
        "variants": {"fp32": {"precision": "fp32", "files": ["fp32.onnx"]}},
        "files": {"fp32.onnx": {"sha256": HASH, "bytes": 1}},
    }
    return Manifest.model_validate({**fields, **changes})


def make_signature(**changes: Any) -> Signature:
    return Signature.of(make_manifest(**changes))
