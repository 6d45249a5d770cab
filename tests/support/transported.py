"""Batches through a transport, whose memory is written over as soon as they are released."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.border import FrontSide, Transport
from tests.support.scheduling import Sent, until
from vernier.border.batch import RequestBatch


class Poisoned(Sent):
    """A batch whose memory is written over as soon as it is released."""

    def __init__(self, *each: int, front: FrontSide | None = None, **fields: Any) -> None:
        super().__init__(*each, **fields)
        inputs = self.batch.inputs["x"]
        if front is not None:  # where a front's bodies lie
            memory = front.arena.take(inputs.nbytes).view(np.float32).reshape(inputs.shape)
            memory[...] = inputs
            self.batch.inputs["x"] = memory

    def released(self, batch: RequestBatch) -> None:
        super().released(batch)
        batch.inputs["x"][...] = np.nan


async def ended(transport: Transport, *sent: Sent) -> None:
    await transport.settle()
    await until(lambda: all(one.releases for one in sent))
    assert [one.releases for one in sent] == [1] * len(sent)
