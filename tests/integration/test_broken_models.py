"""Models that are built to break end in a right answer or a clear refusal, never in a package that is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.precision.broken import Trap, traps
from vernier.budget import Budget, parse_term
from vernier.builder.evaluate import run_model
from vernier.builder.graphs.prepare import prepare
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.nodes.placement import quantizable_nodes
from vernier.builder.pipeline import build
from vernier.builder.progress import NoProgress
from vernier.builder.quantizing.calibrate import calibrate
from vernier.builder.quantizing.weights import quantize_weights
from vernier.builder.request import BuildRequest
from vernier.builder.samples.data import ArraySamples
from vernier.builder.searching.gate import default_budget, gate
from vernier.engine.ort import RUNTIME

TRAPS = {trap.name: trap for trap in traps()}


def request(trap: Trap, folder: Path) -> BuildRequest:
    onnx.save(trap.model, folder / "model.onnx")
    np.savez(folder / "calibration.npz", x=trap.draw(384, 1))
    np.savez(folder / "eval.npz", x=trap.draw(1024, 2))
    return BuildRequest(
        model=folder / "model.onnx",
        name="trap",
        out=folder / "engines",
        precisions=("fp32", "bf16", "fp16", "int8-fp32", "int8"),
        calibration=str(folder / "calibration.npz"),
        evaluation=str(folder / "eval.npz"),
        max_batch=4,
    )


@pytest.mark.parametrize("name", TRAPS)
def test_what_passes_its_gate_is_right_on_other_data_as_well(name: str, tmp_path: Path) -> None:
    trap = TRAPS[name]
    outcome = build(request(trap, tmp_path), NoProgress())
    held_out = ArraySamples({"x": trap.draw(2048, 3)})
    reference = run_model(tmp_path / "model.onnx", held_out)
    for variant in outcome.variants:
        if variant.precision not in outcome.manifest.variants:
            assert variant.status == "refused"
            assert variant.reason
            continue
        entry = outcome.manifest.variants[variant.precision]
        budget = Budget(tuple(parse_term(text) for text in next(iter(entry.gates.values())).budget))
        path = outcome.package / entry.files[0]
        emulated = gate(reference, run_model(onnx.load(path), held_out), None, budget)
        assert emulated.passed, (variant.precision, emulated.reason)
        if RUNTIME in entry.gates and entry.gates[RUNTIME].passed:
            outputs = run_model(path, held_out, as_on_gpu=False, optimize=True)
            served = gate(reference, outputs, None, budget)
            assert served.passed, (variant.precision, served.reason)


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_does_break_a_build_without_care(name: str, tmp_path: Path) -> None:
    trap = TRAPS[name]
    wanted = request(trap, tmp_path)
    prepared = prepare(wanted.model, {}, tmp_path, max_batch=4)
    nodes = quantizable_nodes(prepared.model)
    ranges = calibrate(prepared.model, nodes, ArraySamples({"x": trap.draw(384, 1)}), "minmax").scales
    rounded = quantize_weights(prepared.model, nodes, None, "nearest", ranges=ranges)
    everything = Recipe("fp16", int8=frozenset(n.name for n in nodes), ranges=ranges, weights=rounded)
    samples = ArraySamples({"x": trap.draw(1024, 2)})
    reference = run_model(wanted.model, samples)
    budget = default_budget(reference, None)
    passed = [
        gate(reference, run_model(lower(prepared.model, recipe), samples), None, budget).passed
        for recipe in (everything, Recipe("fp16"))
    ]
    assert not all(passed)
