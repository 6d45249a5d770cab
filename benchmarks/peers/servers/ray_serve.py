"""Ray Serve with `serve.batch`, one replica; the proxy, the replica and Ray's own processes share the core."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import ray
from common import MAX_BATCH, Model, arguments
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

PORT, PATH, WORKLOAD = arguments()


@serve.deployment(num_replicas=1, max_ongoing_requests=4 * MAX_BATCH, ray_actor_options={"num_cpus": 0})
class Rows:
    def __init__(self, path: str, workload: str) -> None:
        self.model = Model(path, workload)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.001)
    async def predict(self, rows: list[Any]) -> list[Any]:
        return list(self.model(np.asarray(rows, np.float32)))

    async def __call__(self, request: Request) -> Any:
        if WORKLOAD == "json":
            return {"y": (await self.predict((await request.json())["x"])).tolist()}
        y = await self.predict(np.frombuffer(await request.body(), np.float32))
        return Response(y.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Rows.bind(PATH, WORKLOAD), route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
