"""Speed on a GPU beside the raw engine's, written to benchmarks/GPU.md.

    python -m benchmarks.gpu.packages PACKAGES     (the builder's Python: needs onnx)
    python -m benchmarks.gpu --packages PACKAGES   (the Python that has TensorRT and PyCUDA)
    python -m benchmarks.gpu --packages PACKAGES --keep --gpus 0 1      what two GPUs reach together

Without --packages the page is written again from the results stored before; with --keep they are kept and
those measured now take their places among them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
from pathlib import Path
from typing import Any, Dict, List, Optional

from benchmarks.gpu.report import put_row, write_page

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "GPU.md"
PROFILES = 9  # eight slots, and the raw engine's own
NETWORKS = {
    "resnet50": (("fp16", "int8", "tf32", "fp32"), (1, 8, 64, 256)),
    "ranker": (("fp32", "fp16", "int8"), (1, 8, 64, 256)),
    "keywords": (("fp32", "fp16", "int8"), (1, 8, 32, 64)),
}
#: The batch at which the number of slots is varied.
FOCUS = 64


class Recorder:
    """Results so far, on disk after each row: a run that is cut short has lost nothing.

    keep: rows that are in the file already stay, unless they are measured again.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.machine = machine()
        self.results: Dict[str, Any] = {"machine": self.machine}
        if keep and path.is_file():
            self.results = json.loads(path.read_text())
        for kind in ("networks", "small", "several"):
            self.results.setdefault(kind, [])

    def add(self, kind: str, row: Dict[str, Any]) -> None:
        """A row tells its machine where that is not the page's, or not of its day."""
        if self.machine != self.results["machine"]:
            row = {**row, "machine": self.machine}
        put_row(self.results[kind], row)
        self._path.write_text(json.dumps(self.results, indent=1))


def measure_network(
    recorder: Recorder, bench: Any, precision: str, batches: List[int], seconds: float
) -> None:
    from benchmarks.gpu.measure import relative_error

    plan, built_s = bench.plan(precision, PROFILES)
    executor = bench.executor(plan, precision)
    error = relative_error(bench, executor)
    print(
        f"{bench.manifest.name} {precision}: built in {built_s:.1f} s, {len(plan) >> 10} KiB, {error}",
        flush=True,
    )
    for batch in batches:
        row = {
            "network": bench.manifest.name,
            "precision": precision,
            "batch": batch,
            "plan_bytes": len(plan),
            "build_s": built_s,
            "error": error,
            **_measure_batch(bench, executor, plan, batch, seconds),
        }
        recorder.add("networks", row)
        best = max(row["pool"], key=lambda p: float(p["per_s"]))
        print(
            f"  batch {batch}: raw {batch / row['raw_in_a_row_s']:,.0f} rows/s, slot "
            f"{row['slot']['p50'] * 1e3:.3f} ms, pool {best['per_s'] * batch:,.0f} with {best['slots']} slots = "
            f"{best['per_s'] * row['raw_in_a_row_s']:.1%}, filled "
            f"{max(p['per_s'] for p in row['pool_filled']) * batch:,.0f}",
            flush=True,
        )
    executor.close()


def _measure_batch(bench: Any, executor: Any, plan: bytes, batch: int, seconds: float) -> Dict[str, Any]:
    from benchmarks.gpu.measure import RawEngine, pool_throughput, round_trip

    inputs = bench.inputs(batch)
    row: Dict[str, Any] = {}
    raw = RawEngine(executor, inputs)
    row["raw_alone_s"], row["raw_in_a_row_s"] = raw.seconds(seconds)
    if batch == FOCUS:
        row["layers_ms"] = raw.layers()
    raw.close()
    slot = executor.open_slot()
    row["slot"] = round_trip(slot, inputs, seconds, filled=False)
    slot.close()
    # Long executions need longer for as many of them.
    lasting = max(seconds, 40 * row["raw_in_a_row_s"]) * (2 if batch == FOCUS else 1)
    counts = (1, 2, 3, 4) if batch == FOCUS else (2, 3)
    row["pool"] = [pool_throughput([executor], inputs, slots, lasting, filled=False) for slots in counts]
    counts = (2, 4, 8) if batch == FOCUS else (4,)
    row["pool_filled"] = [
        pool_throughput([executor], inputs, slots, lasting, filled=True) for slots in counts
    ]
    if batch == 1:
        plain = bench.executor(plan, executor.precision, use_graphs=False)
        slot = plain.open_slot()
        row["plain"] = round_trip(slot, inputs, seconds, filled=False)
        slot.close()
        plain.close()
    return row


def measure_small(recorder: Recorder, bench: Any, seconds: float) -> None:
    """The small network's round trip: by graph with copies, by graph over the bus, and call by call."""
    from benchmarks.gpu.measure import RawEngine, round_trip

    for precision in ("fp32", "fp16"):
        plan, _ = bench.plan(precision, 2)
        for batch in (1, 8, 64, 256):
            inputs = bench.inputs(batch)
            row: Dict[str, Any] = {"precision": precision, "batch": batch}
            ways: Dict[str, Dict[str, Any]] = {
                "default": {},
                "copied": {"mapped_bytes": 0},
                "mapped": {"mapped_bytes": 1 << 20},
                "plain": {"mapped_bytes": 0, "use_graphs": False},
            }
            for label, changes in ways.items():
                executor = bench.executor(plan, precision, **changes)
                slot = executor.open_slot()
                row[label] = round_trip(slot, inputs, seconds, filled=False)
                row[f"{label}_filled"] = round_trip(slot, inputs, seconds, filled=True)
                slot.close()
                if label == "default":
                    raw = RawEngine(executor, inputs)
                    row["raw_alone_s"], row["raw_in_a_row_s"] = raw.seconds(seconds)
                    raw.close()
                executor.close()
            recorder.add("small", row)
            shown = ", ".join(f"{way} {row[way]['p50'] * 1e6:.1f}" for way in ways)
            print(
                f"mlp {precision} batch {batch}: raw {row['raw_alone_s'] * 1e6:.1f}, {shown} us", flush=True
            )


def measure_several(
    recorder: Recorder, package: Path, work: Path, precision: str, gpus: List[int], seconds: float
) -> None:
    """The pool's rate on the first GPU alone and on all of them in one process, at the batch FOCUS."""
    from benchmarks.gpu.measure import Bench, pool_throughput

    benches = [Bench.open(package, work, gpu) for gpu in gpus]
    plan, _ = benches[0].plan(precision, PROFILES)
    executors = [bench.executor(plan, precision) for bench in benches]
    inputs = benches[0].inputs(FOCUS)
    for count in range(1, len(gpus) + 1):
        row: Dict[str, Any] = {"network": benches[0].manifest.name, "precision": precision, "batch": FOCUS}
        row["gpus"] = count
        for kind, filled in (("pool", False), ("pool_filled", True)):
            row[kind] = [
                pool_throughput(executors[:count], inputs, slots * count, seconds, filled)
                for slots in (2, 3, 4)
            ]
        recorder.add("several", row)
        rates = [
            ", ".join(f"{p['per_s'] * FOCUS:,.0f}" for p in row[kind]) for kind in ("pool", "pool_filled")
        ]
        print(f"{precision} on {count} GPUs, 2, 3, 4 slots each: {rates[0]}; filled {rates[1]}", flush=True)
    for executor in executors:
        executor.close()


def machine() -> Dict[str, str]:
    from vernier.builder.plans.plan_libraries import usable_tactic_sources
    from vernier.engine.cuda import open_device
    from vernier.engine.trt_runtime.trt_api import load_api

    device, api = open_device(), load_api("tensorrt")
    found = {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "tensorrt": api.version,
        "missing_libraries": usable_tactic_sources(api, -1)[1],
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "driver": "unknown",
    }
    try:
        import pynvml
    except ImportError:
        return found
    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    return {**found, "driver": driver.decode() if isinstance(driver, bytes) else driver}


def measure(arguments: argparse.Namespace) -> None:
    from benchmarks.gpu.measure import Bench

    work: Path = arguments.work or arguments.results.parent
    work.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(arguments.results, arguments.keep)
    if arguments.gpus:
        package = arguments.packages / "resnet50" / "1"
        for precision in arguments.precisions or ["fp16", "int8"]:
            measure_several(recorder, package, work, precision, arguments.gpus, 4 * arguments.seconds)
        return
    for name in arguments.only:
        package = arguments.packages / name / "1"
        if not package.is_dir():
            print(f"there is no package {package}; left out", flush=True)
            continue
        bench = Bench.open(package, work)
        if name == "mlp":
            measure_small(recorder, bench, arguments.seconds)
            continue
        precisions, batches = NETWORKS[name]
        for precision in precisions:
            wanted: Optional[List[str]] = arguments.precisions
            if precision in bench.manifest.variants and (wanted is None or precision in wanted):
                measure_network(recorder, bench, precision, list(batches), arguments.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, help="made by benchmarks.gpu.packages")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "gpu.json")
    parser.add_argument("--work", type=Path, help="where timing caches are kept; default: beside the results")
    parser.add_argument("--only", nargs="*", default=["mlp", *NETWORKS])
    parser.add_argument("--precisions", nargs="*")
    parser.add_argument("--keep", action="store_true", help="add to the results that are there")
    parser.add_argument(
        "--gpus", nargs="+", type=int, help="measure ResNet-50 on these GPUs together instead"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if arguments.packages is not None:
        measure(arguments)
    write_page(json.loads(arguments.results.read_text()), PAGE)


if __name__ == "__main__":
    main()
