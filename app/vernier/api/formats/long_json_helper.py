"""`python -m vernier.api.formats.long_json_helper`: decodes long bodies, one after the other.

Standard input is a socket to the service; the helper ends when that does.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import orjson

from vernier.api.formats.codecs import Inputs, PredictRequest, parse_predict
from vernier.api.formats.long_json import receive_message, send_message, shared_file, write_all
from vernier.api.instances import parse_instances
from vernier.api.invocations import parse_invocation
from vernier.api.v2.requests import parse_infer
from vernier.border.signature import Signature
from vernier.errors import InvalidJson, RequestError
from vernier.tensors import Arrays, TensorSpec

#: Address space: that of the interpreter, and what parsing and decoding the largest body can take.
_OWN_BYTES, _TIMES_THE_BODY = 2**30, 16
_MAX_ENVELOPE_BYTES = 2**19
_ALIGNMENT = 64
#: Longer sentences hold a client's own text.
_MAX_SENTENCE = 1000
_NICE = 5
#: By the name of the protocol's LongFormat.
_PARSERS: dict[str, Callable[..., tuple[PredictRequest, Inputs]]] = {
    "predict": parse_predict,
    "infer": parse_infer,
    "instances": parse_instances,
    "invocation": parse_invocation,
}


def _limit(max_body_bytes: int) -> None:
    """This process is ended before the service is, and gives way to it."""
    with suppress(OSError, ValueError):
        limit = _OWN_BYTES + _TIMES_THE_BODY * max_body_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    with suppress(OSError):
        os.nice(_NICE)


class Decoder:
    """Answers the messages of the service."""

    def __init__(self) -> None:
        self._inputs: Inputs | None = None

    def answer(self, message: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """The answer, and file descriptors to be closed once it has been sent."""
        try:
            if "read" in message:
                self._inputs = None  # or its parser could not be used again
                return {"envelope": self._read(fds[0], message)}, []
            inputs, self._inputs = self._inputs, None
            assert inputs is not None
            return self._decode(inputs, message)
        except RequestError as error:
            sentence = error.message
            if len(sentence) > _MAX_SENTENCE:
                sentence = sentence[:_MAX_SENTENCE] + "…"
            return {"error": type(error).__name__, "message": sentence}, []
        except MemoryError:
            sentence = "decoding the body takes more memory than it may; send fewer rows in a request"
            return {"error": "BodyTooLarge", "message": sentence}, []
        finally:
            for fd in fds:
                os.close(fd)

    def _read(self, fd: int, message: dict[str, Any]) -> dict[str, Any]:
        parse = _PARSERS[message["read"]]
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            envelope, self._inputs = parse(file.read(), *message["arguments"])
        fields = asdict(envelope)
        if len(orjson.dumps(fields)) > _MAX_ENVELOPE_BYTES:
            raise InvalidJson(
                f"what stands beside 'inputs' is longer than {_MAX_ENVELOPE_BYTES} bytes; send less"
            )
        return fields

    def _decode(self, inputs: Inputs, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        specs = {name: TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in message["decode"]}
        batch_dim, fixed_batch = message["batch"]
        signature = Signature(message["model"], specs, {}, {}, batch_dim, fixed_batch, {})
        arrays = inputs.decode(signature)
        del inputs
        return _shared(arrays)


def _shared(arrays: Arrays) -> tuple[dict[str, Any], list[int]]:
    described, offset = [], 0
    file = shared_file()
    with file:
        for name, array in arrays.items():
            shape, dtype = array.shape, array.dtype.str
            is_empty = (
                not any(array.strides) or not array.nbytes
            )  # of a shape that will be refused, or of no numbers
            at = None if is_empty and array.size != 1 else offset
            described.append({"name": name, "shape": shape, "dtype": dtype, "offset": at})
            if at is not None:
                array = np.ascontiguousarray(array)
                file.seek(offset)
                write_all(file, array.data.cast("B"))
                offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        file.truncate(max(offset, 1))
        return {"arrays": described}, [os.dup(file.fileno())]


def main() -> None:
    _limit(int(sys.argv[1]))
    connection = socket.socket(fileno=os.dup(0))
    decoder = Decoder()
    while True:
        try:
            message, received = receive_message(connection)
        except (EOFError, OSError):
            return
        answer, fds = decoder.answer(message, received)
        send_message(connection, answer, fds)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    main()
