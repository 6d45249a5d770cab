"""What is sent, and how its answer is judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Whether the body of a 2xx answer is right.
Check = Callable[[bytes], bool]


@dataclass(frozen=True, slots=True)
class Call:
    """One request, ready to send.

    Attributes:
        payload: head and body.
        check: judges the body of an answer with a status of 2xx; None takes any.
    """

    payload: bytes
    check: Check | None = None


def post(
    path: str,
    body: bytes,
    content_type: str = "application/json",
    *,
    headers: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
) -> bytes:
    """The bytes of a POST request on a connection that is kept."""
    lines = {
        "host": host,
        "content-type": content_type,
        "content-length": str(len(body)),
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


@dataclass(frozen=True)
class JsonOutput:
    """Checks numbers inside a JSON answer.

    Args:
        path: the keys that lead to them.
        values: what must stand there, nested lists being flattened.
        tolerance: of the largest absolute difference.
    """

    path: tuple[str | int, ...]
    values: Sequence[float]
    tolerance: float = 1e-4

    def __call__(self, body: bytes) -> bool:
        try:
            found: Any = json.loads(body)
            for key in self.path:
                found = found[key]
            numbers = np.asarray(found, np.float64).ravel()
        except (ValueError, KeyError, IndexError, TypeError):
            return False
        return _close(numbers, self.values, self.tolerance)


@dataclass(frozen=True)
class FloatOutput:
    """Checks an answer that ends with the little-endian bytes of float32 numbers, whatever stands before them."""

    values: Sequence[float]
    tolerance: float = 1e-4

    def __call__(self, body: bytes) -> bool:
        size = 4 * len(self.values)
        return len(body) >= size and _close(
            np.frombuffer(body[len(body) - size :], "<f4"), self.values, self.tolerance
        )


def _close(found: np.ndarray, values: Sequence[float], tolerance: float) -> bool:
    # a NaN compares false, so it is never right
    return found.size == len(values) and bool(np.all(np.abs(found - np.asarray(values)) <= tolerance))
