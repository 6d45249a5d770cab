"""Builds the models that are made to break, and judges what came of them on other data."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from benchmarks.precision.broken import Trap, traps
from vernier.budget import Budget, parse_term
from vernier.builder.evaluate import run_model
from vernier.builder.pipeline import build
from vernier.builder.progress import NoProgress
from vernier.builder.request import BuildRequest
from vernier.builder.samples.data import ArraySamples
from vernier.builder.searching.gate import make_judge, sanity_budget

_CALIBRATION, _EVALUATION, HELD_OUT = 512, 2048, 8192


@dataclass(frozen=True)
class Sprung:
    """One precision of one trap.

    status: `pass` or `refused` by the gate.
    used: the part of the budget that what passed uses up on held-out data; None for what was refused.
    sane: whether every answer is still the same answer (the gate's sanity bound).
    assignment: weighted nodes by type.
    """

    trap: str
    what: str
    precision: str
    status: str
    used: float | None
    sane: bool | None
    assignment: dict[str, int]


def measure_traps() -> list[Sprung]:
    """Every trap in every precision."""
    return [sprung for trap in traps() for sprung in _measure(trap)]


def _measure(trap: Trap) -> list[Sprung]:
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as scratch:
        folder = Path(scratch)
        onnx.save(trap.model, folder / "model.onnx")
        for name, count, seed in (("calibration", _CALIBRATION, 1), ("eval", _EVALUATION, 2)):
            np.savez(folder / f"{name}.npz", x=trap.draw(count, seed))
        request = BuildRequest(
            model=folder / "model.onnx",
            name="trap",
            out=folder / "engines",
            precisions=("fp32", "bf16", "fp16", "int8-fp32", "int8"),
            calibration=str(folder / "calibration.npz"),
            evaluation=str(folder / "eval.npz"),
            max_batch=8,
        )
        outcome = build(request, NoProgress())
        held_out = ArraySamples({"x": trap.draw(HELD_OUT, 3)})
        reference = run_model(trap.model, held_out)
        found = []
        for variant in outcome.variants[1:]:
            entry = outcome.manifest.variants.get(variant.precision)
            used = sane = None
            if entry is not None:
                texts = next(iter(entry.gates.values())).budget
                judge = make_judge(Budget(tuple(parse_term(t) for t in texts)), reference, None)
                outputs = run_model(onnx.load(outcome.package / entry.files[0]), held_out)
                used = judge.judge(outputs).used
                sane = make_judge(sanity_budget(reference), reference, None).judge(outputs).passed
            status = "refused" if entry is None else "pass"
            assignment = dict(variant.assignment) if entry is not None else {}
            found.append(Sprung(trap.name, trap.what, variant.precision, status, used, sane, assignment))
        return found


def traps_json(found: list[Sprung]) -> str:
    return json.dumps([asdict(sprung) for sprung in found], indent=1) + "\n"


def read_traps(text: str) -> list[Sprung]:
    return [Sprung(**entry) for entry in json.loads(text)]
