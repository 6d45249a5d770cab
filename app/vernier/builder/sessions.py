"""Sessions for batches that run beside one another; what ONNX Runtime refuses becomes a sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from vernier.builder.graphs.probe import RunFailed, open_session
from vernier.builder.parallel import THREADS
from vernier.engine.ort import first_line
from vernier.errors import BuildError
from vernier.tensors import Array, Arrays


def load(model: ModelProto | Path, *, optimize: bool = False, what: str = "model") -> Any:
    """A session; without `optimize` it runs the graph as it is. Raises BuildError about `what`."""
    with tempfile.TemporaryDirectory(prefix="vernier-session-") as work:
        try:
            return open_session(model, Path(work), THREADS, optimize)
        except RunFailed as error:
            raise BuildError(f"ONNX Runtime cannot load the {what}: {error}") from error


def run(session: Any, names: Sequence[str] | None, feed: Arrays, failing: str) -> list[Array]:
    """The outputs `names`, or all. Raises BuildError: `failing`, and ONNX Runtime's reason."""
    try:
        return list(session.run(names, feed))
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise BuildError(f"{failing}: {first_line(error)}") from error
