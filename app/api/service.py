"""A prediction without a protocol: from an envelope to a request that the scheduler takes.

Every front (v1 JSON, raw bytes, the fast path) goes through `Predictions.prepare`, so that they
validate alike and answer with the same errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.api.codecs import PredictRequest, decode_inputs, tensor_from_bytes
from app.errors import DeadlineExceeded, Draining, UnsupportedPrecision
from app.serving.lifecycle import Lifecycle
from app.serving.repository import LoadedModel, Repository
from app.tensors import Arrays


@dataclass(frozen=True, slots=True)
class Prepared:
    """A validated prediction. `deadline` is on the service's monotonic clock, in seconds."""

    model: LoadedModel
    inputs: Arrays
    rows: int
    outputs: Sequence[str]
    precision: str | None
    priority: int
    deadline: float | None


class Predictions:
    """Resolves models and validates requests. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        repository: Repository,
        lifecycle: Lifecycle,
        clock: Callable[[], float],
        default_timeout_ms: float | None,
    ) -> None:
        self.repository = repository
        self.clock = clock
        self._lifecycle = lifecycle
        self._default_timeout_ms = default_timeout_ms

    def prepare(
        self, envelope: PredictRequest, model: LoadedModel, arrived: float, raw: bytes | None = None
    ) -> Prepared:
        """Validates everything about a request; `raw` replaces the envelope's inputs.

        Args:
            arrived: when the request's first byte was seen, on `clock`.

        Raises:
            RequestError: see app.errors; DeadlineExceeded when the deadline has passed already.
        """
        if self._lifecycle.refuses_new:
            raise Draining("the service is shutting down; send the request to another instance")
        signature = model.signature
        precision = envelope.precision
        if precision is not None and precision not in model.precisions:
            raise UnsupportedPrecision(
                f"model '{model.name}' version {model.version} has no '{precision}' variant; "
                f"it has {', '.join(model.precisions)}"
            )
        inputs = decode_inputs(envelope, signature) if raw is None else tensor_from_bytes(raw, signature)
        rows = signature.check(inputs)
        outputs = signature.select_outputs(envelope.outputs)
        timeout_ms = self._default_timeout_ms if envelope.timeout_ms is None else envelope.timeout_ms
        deadline = None if timeout_ms is None else arrived + timeout_ms / 1e3
        if deadline is not None and self.clock() >= deadline:
            raise DeadlineExceeded(
                f"the deadline of {timeout_ms:g} ms had passed before the request could be queued; allow more time"
            )
        return Prepared(model, inputs, rows, outputs, precision, envelope.priority, deadline)
