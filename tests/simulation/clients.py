"""Clients of all kinds, and the small model that says what each of them must see.

A client is written by its seed alone: requests with what must be answered to each, how their bytes are cut, when it
pauses, how it reads, and how it ends.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tests.simulation.service import IDLE_S, KEY, MAX_BODY_BYTES, REQUEST_S, Service, answer_of, digest
from tests.simulation.virtual import Wire

Closes = Literal["no", "may", "must"]
Part = bytes | float  # what is sent, or seconds that pass

STREAMED = b"".join(b"%d" % part * 20_000 for part in range(5))
#: More than the service throws away behind an early answer.
FAR_TOO_MUCH = 900_000
MALFORMED = [
    b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n",
    b"GET /early HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    b"GET /early HTTP/1.1\nhost: x\n\n",
    b"GET /early HTTP/1.1\r\nhost: x\r\nx-a: b\r\n folded\r\n\r\n",
    b"GET /early HTTP/1.1\r\nhost: x\r\nx-a: b\0c\r\n\r\n",
    b"GET /early HTTP/2.0\r\nhost: x\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: +5\r\n\r\n",
    b"POST /v1/predict HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
]
BAD_CHUNKS = [
    b"zz\r\n",
    b"-1\r\n",
    b"5\nhello\n",
    b"5 \r\nhello\r\n",
    b"5\r\nhelloXX\r\n",
    b"0\r\nnot a header\r\n\r\n",
]


@dataclass
class Expected:
    """What is answered to one request. `payload` None stands for any."""

    status: int
    payload: bytes | None
    closes: Closes = "no"
    counts: bool = True  # its body takes memory, so that it may be refused for want of that


class Client:
    """One connection. Seeded: the same `rng` and service make the same run."""

    def __init__(self, service: Service, rng: random.Random, guarded: bool, tight: bool) -> None:
        self.service = service
        self.rng = rng
        self.guarded = guarded
        self.tight = tight
        self.expected: list[Expected] = []
        self.received = bytearray()
        self.steps = 0
        self.kinds: list[str] = []
        self.pace = rng.choice(["prompt"] * 6 + ["slow", "slow", "never"])
        self.end = rng.choice(["idle", "idle", "half-close", "half-close", "cut"])
        self.wire = Wire(service.loop, rng)
        self._over = False  # nothing more is sent

    # --- what is sent -----------------------------------------------------------------------------
    def requests(self) -> Iterator[list[Part]]:
        """The bytes of each request, cut; notes what must be answered."""
        for _ in range(self.rng.choice([1, 2, 3, 5, 12])):
            make = self.rng.choice(self._makers())
            self.kinds.append(make.__name__)
            before = len(self.expected)
            parts = make()
            yield self._cut(parts)
            if any(expected.closes == "must" for expected in self.expected[before:]):
                return

    def _makers(self) -> list[Callable[[], list[Part]]]:
        common = [self._predict, self._predict, self._predict, self._other, self._echo]
        rare = [
            self._large, self._chunked, self._upgrade, self._continue, self._old, self._last, self._early, self._fails,
            self._wide, self._malformed, self._bad_chunk, self._long_head, self._long_trailers, self._too_large,
            self._late_head, self._late_body, self._empty_lines,
        ]  # fmt: skip
        return common * 4 + rare + ([self._wrong_key] * 3 if self.guarded else [])

    def _head(self, method: str, target: str, *lines: str, key: str = KEY, version: str = "1.1") -> bytes:
        fixed = [f"{method} {target} HTTP/{version}", "host: x"]
        if self.guarded:
            fixed.append(f"x-api-key: {key}")
        return "\r\n".join([*fixed, *lines, "", ""]).encode()

    def _body(self, size: int | None = None) -> bytes:
        rng = self.rng
        start = f"wait={rng.choice([0, 0, 1, 20, 700])} "
        if rng.random() < 0.2:
            start += f"size={rng.choice([100, 5000, 90_000])} "
        size = size or rng.choice([20, 100, 1000, 3000, 6000, 30_000])
        return start.encode() + rng.randbytes(4).hex().encode() + b"x" * size

    def _predict(self, *lines: str, body: bytes | None = None, closes: Closes = "no") -> list[Part]:
        body = self._body() if body is None else body
        self.expected.append(Expected(200, answer_of(body), closes))
        return [self._head("POST", "/v1/predict", f"content-length: {len(body)}", *lines) + body]

    def _large(self) -> list[Part]:
        size = self.rng.choice([70_000, 70_000, 200_000])
        raw, target = "content-type: application/octet-stream", "/v1/predict?model=m"
        parts: list[Part] = []
        for _ in range(self.rng.randint(1, 4)):
            body = self._body(size)
            self.expected.append(Expected(200, answer_of(body)))
            parts.append(self._head("POST", target, raw, f"content-length: {len(body)}") + body)
        return parts

    def _chunks(self, body: bytes, trailer: bytes = b"") -> bytes:
        made, at = [], 0
        while at < len(body):
            part = body[at : at + self.rng.choice([1, 7, 500, 20_000])]
            made.append(b"%x%b\r\n%b\r\n" % (len(part), self.rng.choice([b"", b"", b";a=b"]), part))
            at += len(part)
        return b"".join([*made, b"0\r\n", trailer, b"\r\n"])

    def _chunked(self) -> list[Part]:
        body = self._body(self.rng.choice([20, 3000]))
        target, answer = self.rng.choice([("/v1/predict", answer_of(body)), ("/echo", digest(body))])
        self.expected.append(Expected(200, answer))
        trailer = self.rng.choice([b"", b"x-a: b\r\n" * 20])
        return [self._head("POST", target, "transfer-encoding: chunked") + self._chunks(body, trailer)]

    def _upgrade(self) -> list[Part]:
        return self._predict(
            "connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk"
        )

    def _continue(self) -> list[Part]:
        (whole,) = self._predict("expect: 100-continue")
        assert isinstance(whole, bytes)
        at = whole.index(b"\r\n\r\n") + 4
        return [whole[:at], self.rng.choice([0.0, 1.0]), whole[at:]]

    def _old(self) -> list[Part]:
        body = self._body()
        self.expected.append(Expected(200, answer_of(body), "must"))
        return [self._head("POST", "/v1/predict", f"content-length: {len(body)}", version="1.0") + body]

    def _last(self) -> list[Part]:
        return self._predict("connection: close", closes="must")

    def _other(self) -> list[Part]:
        target, status = self.rng.choice(
            [("/slow", 200), ("/early", 200), ("/nothing", 404), ("/stream", 200)]
        )
        self.expected.append(Expected(status, STREAMED if target == "/stream" else digest(b""), counts=False))
        return [self._head("GET", target)]

    def _echo(self) -> list[Part]:
        body = self._body()
        self.expected.append(Expected(200, digest(body)))
        return [self._head("POST", "/echo", f"content-length: {len(body)}") + body]

    def _early(self) -> list[Part]:
        """Answered without its body being read."""
        body = self._body(self.rng.choice([20, 3000, 150_000]))
        self.expected.append(Expected(200, digest(b""), "may"))
        return [self._head("POST", "/early", f"content-length: {len(body)}") + body]

    def _fails(self) -> list[Part]:
        self.expected.append(Expected(500, None, "must", counts=False))
        return [self._head("GET", "/fail")]

    def _wrong_key(self) -> list[Part]:
        body = self._body()
        target = self.rng.choice(["/v1/predict", "/echo"])
        self.expected.append(Expected(401, None, "may", counts=target == "/echo"))
        return [self._head("POST", target, f"content-length: {len(body)}", key="wrong") + body]

    def _wide(self) -> list[Part]:
        lines = [f"x-{n}: {'v' * 100}" for n in range(self.rng.choice([20, 300]))]
        return self._predict(*lines)

    def _malformed(self) -> list[Part]:
        self.expected.append(Expected(400, None, "must", counts=False))
        return [self.rng.choice(MALFORMED) + b"abc"]

    def _bad_chunk(self) -> list[Part]:
        self.expected.append(Expected(400, None, "must"))
        target = self.rng.choice(["/v1/predict", "/echo"])
        good = self._chunks(b"x" * 50)[: -len(b"0\r\n\r\n")]
        return [self._head("POST", target, "transfer-encoding: chunked") + good + self.rng.choice(BAD_CHUNKS)]

    def _long_head(self) -> list[Part]:
        self.expected.append(Expected(431, None, "must", counts=False))
        whole = self._head(*self.rng.choice([("GET", "/early"), ("POST", "/v1/predict")]))
        filler = b"x-a: " + b"y" * 1000 + b"\r\n"
        return [whole[:-2] + filler * 66]

    def _long_trailers(self) -> list[Part]:
        self.expected.append(Expected(431, None, "must"))
        target = self.rng.choice(["/v1/predict", "/echo"])
        chunks = self._chunks(b"x" * 50)[:-2] + b"x-a: b\r\n" * 1200
        return [self._head("POST", target, "transfer-encoding: chunked") + chunks]

    def _too_large(self) -> list[Part]:
        self.expected.append(Expected(413, None, "must"))
        head = self._head("POST", "/v1/predict", f"content-length: {MAX_BODY_BYTES + 1}")
        return [head + b"x" * self.rng.choice([0, 10, 100_000])]

    def _late_head(self) -> list[Part]:
        (whole,) = self._predict()
        assert isinstance(whole, bytes)
        self.expected[-1] = Expected(408, None, "must", counts=False)
        cut = self.rng.randint(1, whole.index(b"\r\n\r\n"))
        return [whole[:cut], REQUEST_S * 4 + 60.0]

    def _late_body(self) -> list[Part]:
        (whole,) = self.rng.choice([self._predict, self._echo])()
        assert isinstance(whole, bytes)
        self.expected[-1] = Expected(408, None, "must")
        return [whole[: -self.rng.randint(1, 20)], REQUEST_S * 4 + 60.0]

    def _empty_lines(self) -> list[Part]:
        return [b"\r\n" * self.rng.randint(1, 3), *self._predict()]

    def _cut(self, parts: list[Part]) -> list[Part]:
        made: list[Part] = []
        for part in parts:
            if isinstance(part, float):
                made.append(part)
                continue
            at = 0
            while at < len(part):
                size = self.rng.choice([1, 30, 500, 4000, 70_000, 10**6, 10**6])
                made.append(part[at : at + size])
                at += size
                if self.rng.random() < 0.1:
                    made.append(self.rng.choice([0.0, 0.001, 0.05, 0.3]))
        return made

    # --- the run ----------------------------------------------------------------------------------
    async def run(self) -> None:
        await asyncio.sleep(self.rng.random())
        self.wire.connect(self.service.connection())
        reading = asyncio.ensure_future(self._read())
        await self._write()
        await reading

    async def _write(self) -> None:
        left = self.rng.randint(1, 40) if self.end == "cut" else None
        for parts in self.requests():
            for part in parts:
                self.steps += 1
                if left is not None:
                    left -= 1
                    if left < 0:
                        self._over = True
                        self.wire.cut()
                        return
                if isinstance(part, float):
                    await asyncio.sleep(part)
                elif not await self.wire.send(part):
                    self._over = True
                    return
            if self.rng.random() < 0.5:  # else the next is pipelined
                await asyncio.sleep(self.rng.choice([0.0, 0.1, 1.0, 3.0]))
        if self.end == "cut":
            self.wire.cut()
        elif self.end == "half-close":
            self.wire.half_close()

    async def _read(self) -> None:
        wire = self.wire
        while True:
            if self.pace == "slow":
                await asyncio.sleep(0.2)
            if self.pace != "never":
                self.steps += 1
                self.received += wire.read(20_000 if self.pace == "slow" else 10**9)
            if wire.ended and (self.pace == "never" or not wire.kernel):
                return
            if self.pace == "never" or not wire.kernel:
                wire.news.clear()
                await wire.news.wait()

    # --- the model --------------------------------------------------------------------------------
    def check(self, drained: bool, stopped: bool) -> None:
        """Raises AssertionError when this client saw what it must not.

        Args:
            drained: the service has begun to shut down meanwhile. stopped: it has asked its connections to end.
        """
        answers = list(self._answers())
        closed = False
        for number, (status, payload, closes, whole) in enumerate(answers):
            assert not closed, f"an answer behind the last one: {status}"
            assert number < len(self.expected), f"an answer to no request: {status} {payload[:80]!r}"
            expected = self.expected[number]
            if not whole:
                assert self._may_lose, f"answer {number} is cut"
                return
            overloaded = self.tight and status == 503 and expected.counts
            if not overloaded:
                assert status == expected.status, (
                    f"answer {number} is {status} {payload[:200]!r}, not {expected}"
                )
                assert expected.payload in (None, payload), f"answer {number} is to another request"
                assert not closes or drained or self.end == "half-close" or expected.closes != "no", (
                    f"answer {number} ends the connection: {expected}"
                )
                assert closes or expected.closes != "must", f"answer {number} does not end the connection"
            closed = closes
        if closed or self.end == "cut" or self._may_lose or stopped:
            return
        assert len(answers) == len(self.expected), f"{len(answers)} answers of {len(self.expected)}"
        assert not self.wire.reset, "cut off without a reason"

    @property
    def _may_lose(self) -> bool:
        """Whether it reads so late that its answers may be dropped."""
        return self.pace != "prompt" or self.end == "cut"

    def _answers(self) -> Iterator[tuple[int, bytes, bool, bool]]:
        """Status, body, whether it ends the connection, whether it is whole."""
        rest = bytes(self.received)
        while rest:
            head, found, rest = rest.partition(b"\r\n\r\n")
            if not found:
                yield 0, b"", False, False
                return
            status = int(head.split(b" ", 2)[1])
            if status == 100:
                continue
            lines = [line.partition(b": ") for line in head.lower().split(b"\r\n")[1:]]
            fields = {name: value for name, _, value in lines}
            assert len(fields) == len(lines), f"a header twice: {head!r}"
            closes = fields.get(b"connection") == b"close"
            if fields.get(b"transfer-encoding") == b"chunked":
                body, rest, whole = _unchunk(rest)
            else:
                length = int(fields[b"content-length"])
                body, rest, whole = rest[:length], rest[length:], len(rest) >= length
            yield status, body, closes, whole
            if not whole:
                return


def _unchunk(data: bytes) -> tuple[bytes, bytes, bool]:
    body = b""
    while True:
        line, found, data = data.partition(b"\r\n")
        if not found:
            return body, b"", False
        size = int(line, 16)
        if len(data) < size + 2:
            return body, b"", False
        body, data = body + data[:size], data[size + 2 :]
        if not size:
            return body, data, True


#: Longer than any client goes on.
AFTER_ALL_S = 10 * IDLE_S + 200
