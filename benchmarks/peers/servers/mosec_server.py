"""MOSEC with dynamic batching; JSON by orjson, binary as raw bytes, which is its fastest."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import orjson
from common import MAX_BATCH, Model
from mosec import Server, Worker

# MOSEC reads the command line itself, in each of its processes
PATH, WORKLOAD = os.environ["PEER_MODEL"], os.environ["PEER_WORKLOAD"]


class Rows(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model(PATH, WORKLOAD)

    def forward(self, data: Any) -> Any:
        if self.max_batch_size == 1:  # then it is one request and no list
            return data[-2:] if WORKLOAD == "large" else self.model(data[None])[0]
        if WORKLOAD == "large":  # nothing to gain from joining them
            return [x[-2:] for x in data]
        return list(self.model(np.stack(data)))


class Json(Rows):
    def deserialize(self, data: bytes) -> np.ndarray:
        return np.asarray(orjson.loads(data)["x"], np.float32)

    def serialize(self, data: Any) -> bytes:
        return orjson.dumps({"y": data}, option=orjson.OPT_SERIALIZE_NUMPY)


class Raw(Rows):
    req_mime_type = resp_mime_type = "application/octet-stream"

    def deserialize(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.float32)

    def serialize(self, data: Any) -> bytes:
        return data.tobytes()


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", sys.argv[1], "--log-level", "error"]
    wait_ms = int(os.environ.get("PEER_WAIT_MS", "1"))
    # what was fastest of 1, 8, 16, 32, 48 and 64 rows, and of 1 and 10 ms
    batch = int(os.environ.get("PEER_BATCH", "1" if WORKLOAD == "large" else str(MAX_BATCH // 2)))
    server = Server()
    server.append_worker(
        Json if WORKLOAD == "json" else Raw,
        num=int(os.environ.get("PEER_WORKERS", "1")),
        max_batch_size=batch,
        max_wait_time=wait_ms,
    )
    server.run()
