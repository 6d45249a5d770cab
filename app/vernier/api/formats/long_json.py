"""Long JSON bodies are decoded in helper processes.

Every JSON parser here holds the interpreter's lock while it runs, and the careful decoder makes an object for each
number: a body of 60 MB would hold up everybody else for seconds. So a body of more than a mebibyte goes to a helper
(`vernier.api.formats.long_json_helper`) in shared memory, and its arrays come back so. A helper that takes
too long, or more memory than a body can need, is ended, and costs one request an error.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import orjson

from vernier import errors
from vernier.api.formats.codecs import Body, PredictRequest
from vernier.border.signature import Signature
from vernier.cores import available_cores
from vernier.errors import BodyTooLarge, NotReady, Overloaded, RequestError
from vernier.tensors import Array, Arrays

#: What one body may take, from when a helper has it. 64 MiB take 0.5 s when they are good and up to 5 s when not.
_MAX_SECONDS = 20.0
#: The largest message of a helper: an envelope with its ids and names, or an error's sentence.
_MAX_MESSAGE_BYTES = 2**20
#: Each helper may use a core and, for a moment, ten times a body's memory.
_MAX_HELPERS = 2
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True)
class LongFormat:
    """A protocol's JSON.

    Attributes:
        name: by which a helper knows its parser.
        envelope: what the parser makes of all but the inputs.
        arguments: of the parser, behind the body.
    """

    name: str
    envelope: type[PredictRequest]
    arguments: tuple[int | str | None, ...] = ()


PREDICT = LongFormat("predict", PredictRequest)


class DecodedInputs:
    """Arrays that a helper decoded for one signature."""

    finite: ClassVar[bool] = True

    def __init__(self, arrays: Arrays, signature: Signature) -> None:
        self._arrays = arrays
        self._signature = signature

    def decode(self, signature: Signature) -> Arrays:
        """Raises NotReady when the model was replaced by one with other inputs meanwhile."""
        if signature is not self._signature and signature.inputs != self._signature.inputs:
            raise NotReady(f"model '{signature.model}' was replaced while the body was read; send it again")
        return self._arrays


#: From what a body says around its inputs to the signature of the model that it is for. Raises RequestError.
SignatureOf = Callable[[PredictRequest], Signature]


class LongJson:
    """A pool of helpers, started when they are first needed. Belongs to the event loop's thread.

    Args:
        max_body_bytes: the largest body; a helper's memory is limited by it.
        helpers: how many bodies are decoded at once; the others wait.
    """

    def __init__(self, max_body_bytes: int = 64 * 2**20, helpers: int | None = None) -> None:
        count = helpers or max(1, min(_MAX_HELPERS, available_cores() // 2))
        self._max_body_bytes = max_body_bytes
        self._idle: list[_Helper] = []
        self._places = asyncio.Semaphore(count)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="long-json")

    async def read(
        self,
        body: list[Body],
        signature_of: SignatureOf,
        is_wanted: Callable[[], bool] = lambda: True,
        long_format: LongFormat = PREDICT,
    ) -> tuple[PredictRequest, DecodedInputs]:
        """The envelope and the inputs of a body.

        Args:
            body: a list with it, which is emptied as soon as the helper has it, so that its memory can go.
            signature_of: called in between, with the envelope; what it raises is raised here.
            is_wanted: whether anybody waits for it when its turn has come.
            long_format: the protocol's.

        Raises:
            RequestError: what the parser and `decode` of its inputs raise, BodyTooLarge when it takes too much
                memory, Overloaded when a helper ends or takes too long.
        """
        async with self._places:
            if not is_wanted():
                raise Overloaded("nobody waits for this body any more")
            helper = self._idle.pop() if self._idle else _Helper(self._max_body_bytes)
            try:
                read = partial(helper.read, long_format=long_format)
                envelope = long_format.envelope(**await self._run(read, body))
                signature = signature_of(envelope)
                inputs = DecodedInputs(await self._run(helper.decode, signature), signature)
            except RequestError:  # the helper waits for the next body
                self._idle.append(helper)
                raise
            except (OSError, EOFError, ValueError) as fault:
                helper.end()
                raise Overloaded(
                    f"the body could not be decoded within {_MAX_SECONDS:g} s and its share of memory; "
                    f"send it in smaller parts, or as raw bytes"
                ) from fault
            except BaseException:
                helper.end()
                raise
            self._idle.append(helper)
            return envelope, inputs

    async def _run(self, function: Callable[..., Any], argument: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, argument))

    def close(self) -> None:
        """Ends the helpers. Nothing may be read any more."""
        while self._idle:
            self._idle.pop().end()
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Helper:
    """One process, as a thread sees it; one call at a time. Calls raise OSError or EOFError when it has ended."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vernier.api.formats.long_json_helper", str(self._max_body_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        ours.settimeout(_MAX_SECONDS)
        self._socket = ours
        return ours

    def read(self, body: list[Body], long_format: LongFormat) -> dict[str, Any]:
        """The fields of the envelope. Raises RequestError."""
        with shared_file() as file:
            write_all(file, memoryview(body[0]))
            body.clear()
            message = {"read": long_format.name, "arguments": long_format.arguments}
            answer = self._ask(message, [file.fileno()])[0]
        return dict(answer["envelope"])

    def decode(self, signature: Signature) -> Arrays:
        """The inputs of the body that was read last. Raises RequestError."""
        specs = [(spec.name, spec.dtype, spec.shape) for spec in signature.inputs.values()]
        batch = signature.batch_dim, signature.fixed_batch
        answer, fds = self._ask({"decode": specs, "model": signature.model, "batch": batch}, [])
        try:
            return _arrays(answer["arrays"], fds[0]) if answer["arrays"] else {}
        finally:
            for fd in fds:
                os.close(fd)

    def _ask(self, message: Mapping[str, Any], fds: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        connection = self._socket or self._start()
        send_message(connection, message, fds)
        answer, received = receive_message(connection)
        error = answer.get("error")
        if error is not None:
            kind = getattr(errors, error, BodyTooLarge)
            raise kind(answer["message"]) if issubclass(kind, RequestError) else ValueError(error)
        return answer, received

    def end(self) -> None:
        """From any thread: a call that is under way ends with it."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _arrays(described: Sequence[Mapping[str, Any]], fd: int) -> Arrays:
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    found: Arrays = {}
    for one in described:
        shape, dtype, offset = tuple(one["shape"]), np.dtype(one["dtype"]), one["offset"]
        array: Array
        if offset is None:  # the helper knows that it holds nothing, or that its shape is wrong
            array = np.broadcast_to(np.zeros((), dtype), shape)
        else:
            array = np.ndarray(shape, dtype, memory, offset)
        found[one["name"]] = array
    return found


# --- what both sides of the border use ------------------------------------------------------------
def shared_file() -> Any:
    """A file in memory that can be sent to another process; it goes when nobody has it open."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("vernier-json", os.MFD_CLOEXEC), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def write_all(file: Any, data: memoryview) -> None:
    """The interpreter's lock is free while the system copies."""
    while data:
        data = data[file.write(data) :]


def send_message(connection: socket.socket, message: Mapping[str, Any], fds: Sequence[int]) -> None:
    data = orjson.dumps(message)
    sent = socket.send_fds(connection, [_LENGTH.pack(len(data))], fds)
    assert sent == _LENGTH.size
    connection.sendall(data)


def receive_message(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Raises EOFError, OSError; ValueError when it is none."""
    start, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    start += _receive(connection, _LENGTH.size - len(start)) if start else b""
    if not start:
        raise EOFError("the other side has gone")
    (length,) = _LENGTH.unpack(start)
    if length > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return dict(orjson.loads(_receive(connection, length))), fds


def _receive(connection: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        part = connection.recv(length - len(found))
        if not part:
            raise EOFError("the other side has gone")
        found += part
    return found
