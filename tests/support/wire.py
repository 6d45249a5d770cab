"""HTTP by hand: bytes in the segments that a test wants, and responses read one by one."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.support.server import Server


def request(
    body: bytes = b"",
    target: str = "/v1/predict",
    method: str = "POST",
    content_type: str = "application/json",
    version: str = "1.1",
    **headers: str,
) -> bytes:
    """A request of known length; underscores in header names stand for hyphens."""
    lines = [f"{method} {target} HTTP/{version}", "host: test", f"content-type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body or method == "POST":
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(body: bytes, size: int = 7, target: str = "/v1/predict", trailer: bytes = b"") -> bytes:
    """The same in chunks of `size` bytes."""
    head = (
        f"POST {target} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"transfer-encoding: chunked\r\n\r\n"
    )
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head.encode() + chunks + b"0\r\n" + trailer + b"\r\n"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A connection to a server."""

    def __init__(self, server: Server, timeout_s: float = 20) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, *segments: bytes) -> None:
        for segment in segments:
            self.socket.sendall(segment)

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError(self._read)
        self._read += data

    def _line(self) -> bytes:
        while b"\r\n" not in self._read:
            self._more()
        line, _, self._read = self._read.partition(b"\r\n")
        return line

    def reply(self) -> Reply:
        """The next response. EOFError when the connection ends before it does."""
        status = int(self._line().split()[1])
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(":")
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", "0"))
        parts = [self._read]
        missing = length - len(self._read)
        while missing > 0:
            self._read = b""
            self._more()
            parts.append(self._read)
            missing -= len(self._read)
        whole = b"".join(parts)
        body, self._read = whole[:length], whole[length:]
        return Reply(status, headers, body)

    def ended(self) -> bool:
        """Waits for the server to close the connection; False when it says something instead."""
        try:
            return not self._read and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True
