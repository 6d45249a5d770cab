"""A prediction without a protocol: from an envelope to a request that the scheduler takes.

Every front (connections, the ASGI route, the other protocols) goes through `Predictions.prepare`, so that they validate
alike and answer with the same errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vernier.api.formats.codecs import Body, Inputs, PredictRequest
from vernier.api.formats.long_json import PREDICT, LongFormat, LongJson
from vernier.border.catalogue import Catalogue, ServedModel
from vernier.border.signature import Signature
from vernier.errors import DeadlineExceeded, Draining, UnsupportedPrecision
from vernier.serving.lifecycle import Lifecycle
from vernier.tensors import Arrays

#: What PendingRequest takes, in its order: inputs, rows, outputs, precision, priority, and the deadline in
#: seconds on the service's monotonic clock.
Prepared = tuple[Arrays, int, Sequence[str], str | None, int, float | None]


class Predictions:
    """Resolves models and validates requests. `clock` is monotonic, in seconds; `long_json` decodes long bodies."""

    def __init__(
        self,
        repository: Catalogue,
        lifecycle: Lifecycle,
        clock: Callable[[], float],
        default_timeout_ms: float | None,
        long_json: LongJson | None = None,
    ) -> None:
        self.repository = repository
        self.clock = clock
        self._lifecycle = lifecycle
        self._default_timeout_ms = default_timeout_ms
        self._long_json = long_json or LongJson()

    def close(self) -> None:
        """Nothing may be read or prepared any more."""
        self._long_json.close()

    async def read_long(
        self,
        body: list[Body],
        arrived: float,
        seen: Callable[[PredictRequest, ServedModel | None], None],
        is_wanted: Callable[[], bool] = lambda: True,
        long_format: LongFormat = PREDICT,
    ) -> tuple[PredictRequest, Inputs]:
        """Reads a long JSON body in a helper; `prepare` must follow, with the model resolved anew.

        Args:
            body: a list with it, which is emptied.
            seen: told the envelope, and then the model with it, as soon as they are known.
            is_wanted: whether anybody waits for it when its turn has come.
            long_format: the protocol's.

        Raises:
            RequestError: whatever the parser, `prepare` and `LongJson.read` raise.
        """

        def signature_of(envelope: PredictRequest) -> Signature:
            seen(envelope, None)
            model: ServedModel = self.repository.resolve(envelope.model, envelope.version)
            seen(envelope, model)
            self._check(envelope, model, arrived)
            return model.signature

        return await self._long_json.read(body, signature_of, is_wanted, long_format)

    def prepare(
        self, envelope: PredictRequest, inputs: Inputs, model: ServedModel, arrived: float
    ) -> Prepared:
        """Validates everything about a request, but its inputs only where there is room for it: under overload
        reading them would cost those that are served.

        Args:
            arrived: when the request's first byte was seen, on `clock`.

        Raises:
            RequestError: see vernier.errors; QueueFull when it would be refused whatever its inputs are,
                DeadlineExceeded when the deadline has passed already.
        """
        outputs, deadline = self._check(envelope, model, arrived)
        signature = model.signature
        arrays = inputs.decode(signature)
        rows = signature.check(arrays, inputs.finite)
        self.require_time(deadline)
        return arrays, rows, outputs, envelope.precision, envelope.priority, deadline

    def _check(
        self, envelope: PredictRequest, model: ServedModel, arrived: float
    ) -> tuple[Sequence[str], float | None]:
        """All that can be known without the inputs: the wanted outputs, and the deadline. Raises as `prepare`."""
        self.require_running()
        precision = envelope.precision
        if precision is not None and precision not in model.precisions:
            raise UnsupportedPrecision(
                f"model '{model.name}' version {model.version} has no '{precision}' variant; "
                f"it has {', '.join(model.precisions)}"
            )
        outputs = model.signature.select_outputs(envelope.outputs)
        timeout_ms = self.timeout_ms(envelope)
        deadline = None if timeout_ms is None else arrived + timeout_ms / 1e3
        self.require_room(model, precision, envelope.priority, deadline)
        return outputs, deadline

    def timeout_ms(self, envelope: PredictRequest) -> float | None:
        """How long after its arrival a request must have its answer; None for as long as that takes."""
        return self._default_timeout_ms if envelope.timeout_ms is None else envelope.timeout_ms

    def require_time(self, deadline: float | None) -> None:
        """Raises DeadlineExceeded when the deadline, on `clock`, has passed."""
        if deadline is not None and self.clock() >= deadline:
            raise DeadlineExceeded(
                "the deadline had passed before the request could be queued; allow more time"
            )

    def require_room(
        self, model: ServedModel, precision: str | None, priority: int, deadline: float | None
    ) -> None:
        """Raises QueueFull, Draining or NotReady when a request that has not been read would be refused anyhow."""
        refusal = model.scheduler.refusal(precision, priority, deadline)
        if refusal is not None:
            model.scheduler.refused(refusal)
            raise refusal

    def require_running(self) -> None:
        """Raises Draining once new requests are refused."""
        if self._lifecycle.refuses_new:
            raise Draining("the service is shutting down; send the request to another instance")
