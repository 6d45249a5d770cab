"""Train the keyword spotter on synthesized speech and write everything that the example commits.

    python examples/speech/train.py            # a few minutes on two cores

Mixed precision by autocast: float16 with a gradient scaler on a GPU, bfloat16 on a CPU. Settings were
chosen on the development voices; the test voices are only measured, once, at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.speech.artefacts import export_onnx, write_metrics
from examples.speech.dataset import Dataset, pad, record, save
from examples.speech.model import KeywordSpotter
from examples.speech.synthesize import Clip, SynthesisError, plan, synthesize
from examples.speech.words import LABELS

COPIES = 4  # noisy recordings of each training clip; an epoch hears one of them
PAUSE_S = {"training": 0.35, "development": 0.2, "test": 0.2}
NOISES = {"training": 1600, "development": 20, "test": 20}
CALIBRATION_CLIPS = 288
HELLO = Clip("hello", "en-gb", "linda", words_per_minute=150, pitch=50, ending="")
SILENCE = -2.0  # the floor of a feature


@dataclass(frozen=True)
class Settings:
    epochs: int = 20
    batch: int = 96
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    seed: int = 0


def batches(data: Dataset, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One copy of every clip, in batches of similar lengths, with random stripes silenced (SpecAugment)."""
    clips = len(data) // COPIES
    chosen = np.arange(clips) * COPIES + rng.integers(COPIES, size=clips)
    lengths = np.array([len(data.features[i]) for i in chosen])
    chosen = chosen[np.argsort(lengths + rng.uniform(-15, 15, clips))]
    groups = [chosen[i : i + size] for i in range(0, clips, size)]
    for index in rng.permutation(len(groups)):
        part = data.pick([int(i) for i in groups[index]])
        features, frames = pad(part.features)
        for row, length in zip(features, frames, strict=True):
            band, width = rng.integers(0, 40), rng.integers(0, 8)
            row[:length, band : band + width] = SILENCE
            start, span = rng.integers(0, length), rng.integers(0, 8)
            row[start : min(start + span, length)] = SILENCE
        yield torch.from_numpy(features), torch.from_numpy(frames), torch.from_numpy(part.labels)


@torch.no_grad()
def accuracy(spotter: KeywordSpotter, data: Dataset, device: torch.device) -> float:
    """The share of recordings whose likeliest class is theirs."""
    spotter.eval()
    right = 0
    for start in range(0, len(data), 128):
        features, lengths = pad(data.features[start : start + 128])
        logits = spotter(torch.from_numpy(features).to(device), torch.from_numpy(lengths).to(device))
        right += int((logits.argmax(1).cpu().numpy() == data.labels[start : start + 128]).sum())
    return right / len(data)


def train(data: Dataset, development: Dataset, settings: Settings) -> KeywordSpotter:
    """Returns the trained model, on the CPU and in evaluation mode."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    narrow = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=narrow == torch.float16)
    spotter = KeywordSpotter(len(LABELS)).to(device)
    optimizer = torch.optim.AdamW(spotter.parameters(), weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(data) // COPIES // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps + 1)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("Training", total=steps)
        for epoch in range(settings.epochs):
            spotter.train()
            for features, lengths, labels in batches(data, settings.batch, rng):
                with torch.autocast(device.type, dtype=narrow):
                    logits = spotter(features.to(device), lengths.to(device))
                loss = cross_entropy(
                    logits.float(), labels.to(device), label_smoothing=settings.label_smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(spotter.parameters(), 5.0)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                progress.advance(task)
            if epoch % 4 == 3 or epoch == settings.epochs - 1:
                share = accuracy(spotter, development, device)
                progress.console.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, development {share:.4f}")
    return spotter.cpu().eval()


def record_split(split: str, cache: Path, seed: int) -> Dataset:
    clips = plan(split, seed)
    return record(
        clips,
        synthesize(clips, cache, f"Speaking: {split}"),
        copies=COPIES if split == "training" else 1,
        throats=split == "training",
        noises=NOISES[split],
        pause_s=PAUSE_S[split],
        seed=seed,
        title=f"Recording: {split}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=Path("build/speech"), help="folder of the synthesized WAV files"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the artefacts go")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--no-test", action="store_true", help="stop after training: to try settings")
    options = parser.parse_args()
    settings = Settings(epochs=options.epochs, seed=options.seed)
    try:
        data = {
            split: record_split(split, options.cache, options.seed)
            for split in ("training", "development", "test")
        }
        hello = synthesize([HELLO], options.cache, "Speaking: hello.wav")[0]
    except SynthesisError as error:
        print(error, file=sys.stderr)
        return 2
    spotter = train(data["training"], data["development"], settings)
    if options.no_test:
        return 0

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hello.wav").write_bytes(hello.read_bytes())
    (options.out / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    export_onnx(spotter, options.out / "model.onnx")
    chosen = np.random.default_rng(options.seed).choice(
        len(data["training"]), CALIBRATION_CLIPS, replace=False
    )
    save(options.out / "calibration.npz", data["training"].pick([int(i) for i in chosen]), labelled=False)
    save(options.out / "eval.npz", data["test"], labelled=True)
    counts = {f"{split}_recordings": len(several) for split, several in data.items()}
    metrics = write_metrics(options.out, plan("test", options.seed), counts)
    print(json.dumps(metrics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
