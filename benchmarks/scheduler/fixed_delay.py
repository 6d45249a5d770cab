"""`python -m benchmarks.scheduler.fixed_delay 2`: the service with the usual policy in the place of its own.

Full batches leave at once, others when the oldest request has waited so many milliseconds. Everything else is
the same service: queue, admission, workers, HTTP.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.scheduler.simulation import fixed_delay
from vernier import __main__ as service
from vernier.serving.queueing.batcher import Batcher
from vernier.serving.scheduling import scheduler

if __name__ == "__main__":
    scheduler.Batcher = partial(Batcher, decide=fixed_delay(float(sys.argv[1]) / 1e3))  # type: ignore[misc]
    service.main()
