"""Trains the architectures and writes each as ONNX with calibration, evaluation and held-out data.

What is trained once lies in a cache folder; another source or seed trains anew.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.precision import data, models
from benchmarks.precision.exhibit import Exhibit

SEED = 20
CALIBRATION, EVALUATION, HELD_OUT = 512, 4096, 8192

Draw = Callable[[int, int], tuple[Any, Any]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """How one exhibit is made. `length` is the number of training samples, each seen `epochs` times."""

    title: str
    build: Callable[[], nn.Module]
    draw: Draw
    loss: Loss
    input_name: str
    output_name: str
    length: int
    epochs: int
    rate: float = 3e-3


def _per_position(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _per_cell(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.float())


PLANS: dict[str, Plan] = {
    "residual": Plan(
        "residual CNN", models.ResidualCnn, data.pictures, F.cross_entropy, "image", "probabilities", 12000, 6
    ),
    "separable": Plan(
        "depthwise-separable CNN", models.SeparableDetector, data.crowds, _per_cell, "image", "rings", 12000, 8
    ),
    "transformer": Plan(
        "transformer encoder", models.Transformer, data.sentences, _per_position, "tokens", "logits", 12000, 8, 1e-3
    ),
    "lstm": Plan(
        "LSTM", models.Recurrent, data.oscillations, F.mse_loss, "signal", "ahead", 12000, 10
    ),
}  # fmt: skip


def make(name: str, folder: Path) -> Exhibit:
    """The exhibit `name`, trained now unless the folder has it already."""
    plan = PLANS[name]
    home = folder / f"{name}-{_fingerprint(plan)}"
    exhibit = Exhibit(
        name, plan.title, *(home / f for f in ("model.onnx", "calibration.npz", "eval.npz", "heldout.npz"))
    )
    if exhibit.model.exists():
        return exhibit
    home.mkdir(parents=True, exist_ok=True)
    for path, count, seed in (
        (exhibit.calibration, CALIBRATION, SEED + 1),
        (exhibit.evaluation, EVALUATION, SEED + 2),
        (exhibit.heldout, HELD_OUT, SEED + 3),
    ):
        inputs, labels = plan.draw(count, seed)
        np.savez(path, **{plan.input_name: inputs, "label": labels})
    model = train(plan)
    export(model, torch.from_numpy(plan.draw(2, 0)[0]), exhibit.model, plan.input_name, plan.output_name)
    return exhibit


def train(plan: Plan, batch: int = 128) -> nn.Module:
    """The trained model in evaluation mode; the same on every run of one machine."""
    torch.manual_seed(SEED)
    model = plan.build()
    inputs, labels = (torch.from_numpy(array) for array in plan.draw(plan.length, SEED))
    steps = plan.epochs * (plan.length // batch)
    optimizer = torch.optim.AdamW(model.parameters(), plan.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=steps)
    for _ in range(plan.epochs):
        order = torch.randperm(plan.length)
        for start in range(0, plan.length - batch + 1, batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            plan.loss(model.logits(inputs[rows]), labels[rows]).backward()  # type: ignore[operator]
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: nn.Module, example: Tensor, path: Path, input_name: str, output_name: str) -> None:
    """ONNX, opset 17, the batch dynamic; written beside and renamed, so that a broken run leaves nothing."""
    part = path.with_suffix(".part")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            str(part),
            dynamo=False,
            opset_version=17,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_axes={input_name: {0: "batch"}, output_name: {0: "batch"}},
        )
    part.rename(path)


def _fingerprint(plan: Plan) -> str:
    source = "".join(inspect.getsource(part) for part in (data, models, train, export))
    text = (
        f"{source}{plan.title}{plan.length}{plan.epochs}{plan.rate}{SEED}{CALIBRATION}{EVALUATION}{HELD_OUT}"
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]
