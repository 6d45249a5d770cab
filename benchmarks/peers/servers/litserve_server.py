"""LitServe with batching, one worker, one API server. It reads JSON and forms only, so it has no binary row."""

from __future__ import annotations

import litserve
import numpy as np
from common import MAX_BATCH, Model, arguments

PORT, PATH, WORKLOAD = arguments()


class Rows(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Model(PATH, WORKLOAD)

    # no annotations in these two: LitServe would make pydantic models of them
    def decode_request(self, request):
        return np.asarray(request["x"], np.float32)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output):
        return {"y": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Rows(max_batch_size=MAX_BATCH, batch_timeout=0.001), accelerator="cpu", workers_per_device=1
    )
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
