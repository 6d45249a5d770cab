"""Trains the ranker on simulated clicks and writes everything that the build needs beside this file.

    python examples/recommender/train.py

writes model.onnx, calibration.npz, eval.npz and metrics.json. Mixed precision throughout: float16
with gradient scaling on a GPU, bfloat16 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import binary_cross_entropy_with_logits

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.recommender import scoring, simulator
from examples.recommender.model import Ranker, export

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CALIBRATION_SAMPLES = 512
EVAL_SAMPLES = 4096
HELD_OUT_SAMPLES = 100_000
_UNKNOWN_SHARE = 0.02  # of ids hidden in training, so that the unknown rows learn an average answer


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = simulator.draw(options.samples, "train")
    validation = simulator.draw(HELD_OUT_SAMPLES, "validation")
    model = Ranker(len(simulator.DENSE), list(simulator.FIELDS.values())).to(device)
    fit(model, train, validation, device, options)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "model.onnx"
    dense, ids, _ = _tensors(validation, "cpu")
    model.cpu().equalize(dense[:20_000], ids[:20_000])
    export(model, path, dense[:4], ids[:4])
    _save(options.out / "calibration.npz", train, CALIBRATION_SAMPLES, with_label=False)
    held_out = simulator.draw(HELD_OUT_SAMPLES, "eval")
    _save(options.out / "eval.npz", held_out, EVAL_SAMPLES, with_label=True)
    metrics = measure(model, path, held_out) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": {
            "train": options.samples,
            "validation": HELD_OUT_SAMPLES,
            "calibration": CALIBRATION_SAMPLES,
            "eval": EVAL_SAMPLES,
            "held_out": HELD_OUT_SAMPLES,
        },
        "epochs": options.epochs,
        "seed": options.seed,
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))


def fit(
    model: Ranker,
    train: simulator.Impressions,
    validation: simulator.Impressions,
    device: str,
    options: argparse.Namespace,
) -> None:
    """Trains in place and leaves the weights of the epoch with the best validation log loss."""
    dense, ids, label = _tensors(train, device)
    batches = len(label) // options.batch
    # Tables decay more than layers: a row is seen a few hundred times and would be learnt by heart.
    optimizer = torch.optim.AdamW(
        [
            {"params": model.tables.parameters(), "weight_decay": options.table_decay},
            {"params": [*model.bottom.parameters(), *model.top.parameters()], "weight_decay": 0.01},
        ],
        lr=options.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.epochs * batches, pct_start=0.1
    )
    half = torch.float16 if device == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    shuffle = torch.Generator().manual_seed(options.seed)
    best, kept = float("inf"), model.state_dict()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=options.epochs * batches)
        for epoch in range(options.epochs):
            order = torch.randperm(len(label), generator=shuffle)[: batches * options.batch].to(device)
            model.train()
            for rows in order.view(batches, options.batch):
                hidden = torch.rand(len(rows), ids.shape[1], device=device) < _UNKNOWN_SHARE
                with torch.autocast(device, dtype=half):
                    logits = model.logits(dense[rows], ids[rows].masked_fill(hidden, 0))
                loss = binary_cross_entropy_with_logits(logits.float()[:, 0], label[rows])
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scale_before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() >= scale_before:  # a lowered scale means that the step was skipped
                    schedule.step()
                progress.advance(task)
            score = predict(model, validation, device)
            found = scoring.log_loss(validation.label, score)
            area = scoring.auc(validation.label, score)
            progress.console.print(f"epoch {epoch + 1}: validation log loss {found:.4f}, AUC {area:.4f}")
            if found < best:
                best = found
                kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)


def predict(model: Ranker, shown: simulator.Impressions, device: str) -> simulator.Array:
    """Float32 click probabilities [n], computed in float32."""
    model.eval()
    dense, ids, _ = _tensors(shown, device)
    with torch.inference_mode():
        parts = [model(d, i)[:, 0] for d, i in zip(dense.split(8192), ids.split(8192), strict=True)]
    return torch.cat(parts).cpu().numpy()


def measure(model: Ranker, path: Path, shown: simulator.Impressions) -> dict[str, Any]:
    """What the exported file reaches on held-out pairs, and how far it is from the PyTorch model."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    score = session.run(["score"], {"dense": shown.dense, "ids": shown.ids})[0][:, 0]
    difference = float(np.abs(score - predict(model, shown, "cpu")).max())
    if difference > 1e-5:
        raise RuntimeError(f"the exported model strays from PyTorch's by {difference}; nothing was measured")
    return {
        "eval": _quality(shown, score, EVAL_SAMPLES),
        "held_out": _quality(shown, score, len(score)),
        "onnx_largest_difference": difference,
    }


def _quality(shown: simulator.Impressions, score: simulator.Array, count: int) -> dict[str, float]:
    label, planted = shown.label[:count], shown.planted[:count]
    return {
        "auc": round(scoring.auc(label, score[:count]), 5),
        "planted_auc": round(scoring.auc(label, planted), 5),
        "log_loss": round(scoring.log_loss(label, score[:count]), 5),
        "planted_log_loss": round(scoring.log_loss(label, planted), 5),
        "click_rate": round(float(label.mean()), 5),
    }


def _tensors(shown: simulator.Impressions, device: str) -> Tensors:
    return (
        torch.from_numpy(shown.dense).to(device),
        torch.from_numpy(shown.ids).to(device),
        torch.from_numpy(shown.label).float().to(device),
    )


def _save(path: Path, shown: simulator.Impressions, count: int, with_label: bool) -> None:
    arrays = {"dense": shown.dense[:count], "ids": shown.ids[:count]}
    if with_label:
        arrays["label"] = shown.label[:count]
    np.savez_compressed(path, allow_pickle=False, **arrays)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to"
    )
    parser.add_argument("--samples", type=int, default=3_000_000, help="training impressions")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--table-decay", type=float, default=0.3, help="AdamW weight decay of the tables")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    return parser.parse_args()


if __name__ == "__main__":
    main()
