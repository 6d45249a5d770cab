"""`python -m benchmarks.gpu.served`: how much of a GPU's engine is left when it is served over HTTP.

The service runs in the Python that has TensorRT (`--server`), the load in this one, each on cores of its own. Requests
of one row, and requests of a whole batch, over kept connections in a closed loop; every sixteenth answer is compared
with ONNX Runtime's. Held against `benchmarks.gpu.bare`: the same engine, batch and number of slots, nothing around it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import tempfile
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load import Call, ClosedLoop, JsonOutput, measure, post
from benchmarks.processes import ROOT, ServerProcess, free_port
from vernier.package.golden import load_golden

_CHECK_EVERY = 16
_WARM_UP_S = 1.0
#: Of the largest values of an output: how far FP16 may stray here.
_TOLERANCE = 3e-2


def calls_of(package: Path, precision: str, rows: int) -> list[Call]:
    """Requests of `rows` rows out of the golden vectors, with their answers."""
    name, golden = package.parent.name, load_golden(package / "golden.npz")
    ((of_input, inputs),) = golden.inputs.items()
    ((of_output, outputs),) = golden.outputs.items()
    calls = []
    for start in range(0, len(inputs), min(rows, len(inputs))):
        taken = np.arange(start, start + rows) % len(inputs)
        asked = {"model": name, "precision": precision, "inputs": {of_input: inputs[taken].tolist()}}
        expected = outputs[taken].ravel().tolist()
        tolerance = _TOLERANCE * float(np.abs(outputs).max())
        check = JsonOutput(("outputs", of_output), expected, tolerance)
        calls.append(Call(post("/v1/predict", json.dumps(asked).encode()), check))
    return calls


def closed(port: int, calls: list[Call], connections: int, seconds: float, core: int) -> dict[str, Any]:
    plan = ClosedLoop(
        port=port,
        calls=calls,
        connections=connections,
        seconds=_WARM_UP_S + seconds,
        check_every=_CHECK_EVERY,
    )
    found = measure(plan, core).after(_WARM_UP_S).summary()
    if found.wrong or found.errors or set(found.statuses) != {200}:
        raise SystemExit(
            f"{found.wrong} of {found.checked} answers were wrong, {found.statuses}, {found.errors}"
        )
    return found.as_dict()


def alone(asked: argparse.Namespace, work: str) -> dict[str, Any]:
    """What `benchmarks.gpu.bare` found."""
    command = [*shlex.split(asked.bare), str(asked.package.resolve()), "--precision", *asked.precision]
    command += ["--batch", str(asked.batch), "--slots", str(asked.slots), "--work", work]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise SystemExit(f"the engine alone cannot be measured: {ran.stderr[-2000:]}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def serve(asked: argparse.Namespace, port: int, work: str) -> ServerProcess:
    environment = {
        "VERNIER_HOST": "127.0.0.1",
        "VERNIER_PORT": str(port),
        "VERNIER_ENGINES_DIR": str(asked.package.resolve().parents[1]),
        "VERNIER_RUNTIME": asked.runtime,
        "VERNIER_CACHE_DIR": f"{work}/cache",
        "VERNIER_SLOTS": str(asked.slots),
        "VERNIER_DEVICES": asked.devices,
        "VERNIER_REBUILD": "wait",
        "VERNIER_LOG_LEVEL": "error",
    }
    return ServerProcess(shlex.split(asked.server), port, Path(work) / "served.log", environment=environment)


def measure_all(asked: argparse.Namespace, work: str) -> dict[str, Any]:
    """All rounds: `bare` in rows per second, `ms` of an execution while all slots are busy, and two summaries."""
    cores, port = sorted(os.sched_getaffinity(0)), free_port()
    rounds: list[dict[str, Any]] = []
    gpus = len(asked.devices.split(","))
    found = {"batch": asked.batch, "slots": asked.slots, "gpus": gpus, "cores": len(cores), "rounds": rounds}
    with serve(asked, port, work) as server:
        every = {p: calls_of(asked.package, p, 1) for p in asked.precision}
        whole = {p: calls_of(asked.package, p, asked.batch) for p in asked.precision}
        print("waiting for the service and its plans", flush=True)
        server.wait_ready([calls[0] for calls in every.values()], timeout_s=300)
        for turn in range(asked.rounds):
            print(f"round {turn + 1} of {asked.rounds}: the engine alone", flush=True)
            bare = alone(asked, work)
            found.update(device=bare["device"], tensorrt=bare["tensorrt"])
            for p in asked.precision:
                print(f"round {turn + 1} of {asked.rounds}: {p} over HTTP", flush=True)
                pool, many = bare["pool"][p], 2 * (asked.slots * gpus + 1)
                rows = closed(port, every[p], many * asked.batch, asked.seconds, cores[-1])
                batches = closed(port, whole[p], many, asked.seconds, cores[-1])
                rounds.append(
                    {
                        "precision": p,
                        "bare": pool["per_s"] * asked.batch,
                        "ms": 1e3 * pool["p50"],
                        "rows": rows,
                        "batches": batches,
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="engines/NAME/VERSION")
    parser.add_argument("--server", required=True, help="starts the service, such as 'python -m vernier'")
    parser.add_argument("--bare", required=True, help="the engine alone: 'python -m benchmarks.gpu.bare'")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument(
        "--devices", default="0", help="GPUs that serve, such as 0,1; the engine alone has one"
    )
    parser.add_argument("--runtime", default="tensorrt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure_all(asked, work)
    print(table(found, asked.precision))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1))


def table(found: dict[str, Any], precisions: list[str]) -> str:
    """Medians of the rounds, and of the ratios of each round, in Markdown."""
    batch, rounds = found["batch"], found["rounds"]
    lines = [
        f"{found['device']}, {found['gpus']} of them serving, TensorRT {found['tensorrt']}, {found['cores']} cores; "
        f"batches of {batch}, {found['slots']} slots each; medians of {len(rounds) // len(precisions)} rounds",
        "",
        "|  | engine alone, rows/s | ms of one | a row a request, rows/s | p50 / p99, ms | of alone "
        "| a batch a request, rows/s | of alone |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for precision in precisions:
        ours = [turn for turn in rounds if turn["precision"] == precision]
        alone = [turn["bare"] for turn in ours]
        rows = [turn["rows"]["goodput"] for turn in ours]
        whole = [turn["batches"]["goodput"] * batch for turn in ours]
        cells = [
            precision.upper(),
            f"{median(alone):,.0f}",
            f"{median(turn['ms'] for turn in ours):.2f}",
            f"{median(rows):,.0f}",
            " / ".join(f"{median(turn['rows'][p] for turn in ours):.1f}" for p in ("p50_ms", "p99_ms")),
            f"{median(map(truediv, rows, alone)):.0%}",
            f"{median(whole):,.0f}",
            f"{median(map(truediv, whole, alone)):.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
