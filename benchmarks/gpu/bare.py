"""`python -m benchmarks.gpu.bare PACKAGE`: executions of one engine with nothing around it, as JSON. Python 3.9.

What `benchmarks.gpu.served` holds the service against: the same batch, copied into the slot's memory, uploaded,
run, downloaded and waited for, again and again from as many threads as the service has slots.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.gpu.measure import Bench, pool_throughput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="engines/NAME/VERSION")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--work", type=Path, required=True, help="keeps plans from one call to the next")
    asked = parser.parse_args()
    found = {}
    bench = Bench.open(asked.package, asked.work)
    for precision in asked.precision:
        plan = asked.work / f"{precision}-{asked.slots}.plan"
        if not plan.exists():
            plan.write_bytes(bench.plan(precision, asked.slots)[0])
        executor = bench.executor(plan.read_bytes(), precision)
        inputs = bench.inputs(asked.batch)
        found[precision] = pool_throughput([executor], inputs, asked.slots, asked.seconds, filled=True)
        executor.close()
    print(json.dumps({"device": bench.device.name, "tensorrt": bench.api.version, "pool": found}))


if __name__ == "__main__":
    main()
