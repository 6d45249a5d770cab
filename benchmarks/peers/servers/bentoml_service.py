"""BentoML with adaptive batching, one worker: `bentoml serve bentoml_service:Rows`.

Its arrays travel as JSON or as pickle; a pickle from strangers is no wire format, so it has no binary row.
"""

from __future__ import annotations

import os

import bentoml
import numpy as np
from common import MAX_BATCH, Model


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Rows:
    def __init__(self) -> None:
        self.model = Model(os.environ["PEER_MODEL"], os.environ["PEER_WORKLOAD"])

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=1000)
    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model(np.asarray(x, np.float32))
