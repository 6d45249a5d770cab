"""Speed on a GPU beside the raw engine's, written to benchmarks/GPU.md.

    python -m benchmarks.gpu.packages PACKAGES     (the builder's Python: needs onnx)
    python -m benchmarks.gpu --packages PACKAGES   (the Python that has TensorRT and PyCUDA)

With `--results FILE` alone the page is written again from stored results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
from pathlib import Path
from typing import Any, Dict, List

from benchmarks.gpu.report import write_page

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "GPU.md"
PROFILES = 5  # four slots, and the raw engine's own
PLAN = {
    "resnet50": (("fp32", "tf32", "fp16", "int8"), (1, 8, 16, 32, 64, 128, 256)),
    "ranker": (("fp32", "fp16", "int8"), (1, 8, 64, 256)),
    "keywords": (("fp32", "fp16", "int8"), (1, 8, 32)),
}


def measure_network(packages: Path, name: str, work: Path, seconds: float) -> List[Dict[str, Any]]:
    from benchmarks.gpu.measure import Bench, RawEngine, pool_throughput, relative_error, round_trip

    bench = Bench.open(packages / name / "1", work)
    precisions, batches = PLAN[name]
    rows: List[Dict[str, Any]] = []
    for precision in precisions:
        if precision not in bench.manifest.variants:
            continue
        plan, built_s = bench.plan(precision, PROFILES)
        executor = bench.executor(plan, precision)
        error = relative_error(bench, executor)
        print(
            f"{name} {precision}: built in {built_s:.1f} s, {len(plan) >> 10} KiB, error {error}", flush=True
        )
        for batch in batches:
            inputs = bench.inputs(batch)
            raw = RawEngine(executor, inputs)
            alone, in_a_row = raw.seconds(seconds)
            layers = raw.layers() if name == "resnet50" and batch == 64 else None
            raw.close()
            row: Dict[str, Any] = {
                "network": name, "precision": precision, "batch": batch, "plan_bytes": len(plan),
                "build_s": built_s, "error": error, "raw_alone_s": alone, "raw_in_a_row_s": in_a_row,
                "layers_ms": layers,
            }  # fmt: skip
            slot = executor.open_slot()
            row["slot"] = round_trip(slot, inputs, seconds, filled=False)
            slot.close()
            row["pool"] = [
                pool_throughput(executor, inputs, slots, seconds, filled=False)
                for slots in ((1, 2, 3, 4) if batch in (64, 256) else (2,))
            ]
            row["pool_filled"] = [
                pool_throughput(executor, inputs, slots, seconds, filled=True) for slots in (2, 4)
            ]
            if batch == 1:
                plain = bench.executor(plan, precision, use_graphs=False)
                slot = plain.open_slot()
                row["plain"] = round_trip(slot, inputs, seconds, filled=False)
                slot.close()
                plain.close()
            rows.append(row)
            best = max(p["per_s"] for p in row["pool"]) * batch
            print(
                f"  batch {batch}: raw {batch / in_a_row:,.0f} rows/s ({alone * 1e3:.3f} ms alone), slot "
                f"{row['slot']['p50'] * 1e3:.3f} ms, pool {best:,.0f} = {best * in_a_row / batch:.1%}, filled "
                f"{max(p['per_s'] for p in row['pool_filled']) * batch:,.0f}",
                flush=True,
            )
        executor.close()
    return rows


def measure_small(packages: Path, work: Path, seconds: float) -> List[Dict[str, Any]]:
    from benchmarks.gpu.measure import MAPPED_BYTES, Bench, RawEngine, round_trip

    bench = Bench.open(packages / "mlp" / "1", work)
    rows: List[Dict[str, Any]] = []
    for precision in ("fp32", "fp16"):
        plan, _ = bench.plan(precision, 2)
        for batch in (1, 8, 64, 256):
            inputs = bench.inputs(batch)
            row: Dict[str, Any] = {"precision": precision, "batch": batch}
            for label, changes in (
                ("mapped", {"mapped_bytes": 1 << 20}),
                ("copied", {"mapped_bytes": 0}),
                ("default", {"mapped_bytes": MAPPED_BYTES}),
                ("plain", {"mapped_bytes": 0, "use_graphs": False}),
            ):
                executor = bench.executor(plan, precision, **changes)
                slot = executor.open_slot()
                row[label] = round_trip(slot, inputs, seconds, filled=True)
                row[f"{label}_run"] = round_trip(slot, inputs, seconds, filled=False)
                slot.close()
                if label == "default":
                    raw = RawEngine(executor, inputs)
                    row["raw_alone_s"], row["raw_in_a_row_s"] = raw.seconds(seconds)
                    raw.close()
                executor.close()
            rows.append(row)
            shown = {k: f"{row[k]['p50'] * 1e6:.1f}" for k in ("mapped", "copied", "default", "plain")}
            print(
                f"mlp {precision} batch {batch}: raw {row['raw_alone_s'] * 1e6:.1f} us, {shown} us",
                flush=True,
            )
    return rows


def machine() -> Dict[str, str]:
    from app.engine.cuda import open_device
    from app.engine.trt_api import load_api

    device = open_device()
    found = {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "tensorrt": load_api("tensorrt").version,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        found["driver"] = driver.decode() if isinstance(driver, bytes) else driver
    except Exception as error:  # the page says what is not known
        found["driver"] = f"unknown ({error})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, help="made by benchmarks.gpu.packages")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "gpu.json")
    parser.add_argument("--work", type=Path, help="where timing caches are kept")
    parser.add_argument("--only", nargs="*", default=["mlp", *PLAN])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if arguments.packages is not None:
        work = arguments.work or arguments.results.parent
        work.mkdir(parents=True, exist_ok=True)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        results: Dict[str, Any] = {"machine": machine(), "networks": [], "small": []}
        for name in arguments.only:
            if name == "mlp":
                results["small"] = measure_small(arguments.packages, work, arguments.seconds)
            elif (arguments.packages / name).is_dir():
                results["networks"] += measure_network(arguments.packages, name, work, arguments.seconds)
            arguments.results.write_text(json.dumps(results, indent=1))
    write_page(json.loads(arguments.results.read_text()), PAGE)


if __name__ == "__main__":
    main()
