"""PyTriton: NVIDIA's Triton server from the wheel, its Python backend, and a function here that it batches for."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from common import MAX_BATCH, Model, arguments
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

PORT, PATH, WORKLOAD = arguments()
model = Model(PATH, WORKLOAD)


@batch
def infer(x: np.ndarray) -> dict[str, Any]:
    return {"y": model(x)}


if __name__ == "__main__":
    shape = (3, 224, 224) if WORKLOAD == "large" else (64,)
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=PORT,
        grpc_address="127.0.0.1",
        grpc_port=int(os.environ["PEER_SECOND_PORT"]),
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="model",
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=shape)],
            outputs=[Tensor(name="y", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)
            ),
        )
        triton.serve()
