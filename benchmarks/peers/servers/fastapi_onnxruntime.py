"""FastAPI and ONNX Runtime as one writes it on the first day: pydantic in, lists out, no batching."""

from __future__ import annotations

import os

import numpy as np
import uvicorn
from common import Model, arguments
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

PORT, PATH, WORKLOAD = arguments()
model = Model(PATH, WORKLOAD)
app = FastAPI()


class Inputs(BaseModel):
    x: list[list[float]]


@app.post("/predict")
async def predict(inputs: Inputs) -> dict[str, list[list[float]]]:
    return {"y": model(np.asarray(inputs.x, np.float32)).tolist()}


@app.post("/raw")
async def raw(request: Request) -> Response:
    x = np.frombuffer(await request.body(), np.float32).reshape(-1, model.width)
    return Response(model(x).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    workers = int(os.environ.get("PEER_WORKERS", "1"))
    uvicorn.run(
        app if workers == 1 else "fastapi_onnxruntime:app",  # several import it by its name
        host="127.0.0.1",
        port=PORT,
        workers=workers,
        access_log=False,
        log_level="warning",
    )
