"""What the trained model leaves behind: the ONNX file, proven equal to PyTorch, and its accuracy."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from examples.speech.features import BANDS
from examples.speech.model import KeywordSpotter, WithProbabilities
from examples.speech.synthesize import ACCENTS, Clip
from examples.speech.words import KEYWORDS, LABELS, UNHEARD_WORDS, UNKNOWN

OPSET = 17


def export_onnx(spotter: KeywordSpotter, path: Path) -> None:
    """Write the model with dynamic batch and frames; fails unless ONNX Runtime gives PyTorch's answers."""
    model = WithProbabilities(spotter).eval()
    example = (torch.randn(2, 60, BANDS), torch.tensor([60, 41]))
    with warnings.catch_warnings():
        # The TorchScript exporter writes plain operators; its successor needs two more packages.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            example,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["features", "lengths"],
            output_names=["probabilities"],
            dynamic_axes={
                "features": {0: "batch", 1: "frames"},
                "lengths": {0: "batch"},
                "probabilities": {0: "batch"},
            },
        )
    onnx.checker.check_model(onnx.load(path), full_check=True)
    features, lengths = torch.randn(5, 87, BANDS), torch.tensor([87, 1, 50, 30, 86])
    with torch.no_grad():
        expected = model(features, lengths).numpy()
    np.testing.assert_allclose(run(path, features.numpy(), lengths.numpy()), expected, atol=1e-5)


def run(
    path: Path, features: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Probabilities [batch, classes] from ONNX Runtime on a CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answer,) = session.run(["probabilities"], {"features": features, "lengths": lengths})
    result: npt.NDArray[np.float32] = answer
    return result


def write_metrics(folder: Path, test: Sequence[Clip], counts: dict[str, int]) -> dict[str, Any]:
    """Judge model.onnx on eval.npz and write metrics.json; `test` are the first clips of eval.npz."""
    with np.load(folder / "eval.npz", allow_pickle=False) as data:
        probabilities = run(folder / "model.onnx", data["features"], data["lengths"])
        labels = data["label"]
    answers = probabilities.argmax(axis=1)
    right = answers == labels
    spoken = labels != LABELS.index(UNKNOWN)
    words = np.array([clip.word for clip in test] + ["(noise)"] * (len(labels) - len(test)))
    new_accent = np.array([clip.accent not in ACCENTS for clip in test] + [False] * (len(labels) - len(test)))
    confusions = Counter(
        (word if word in KEYWORDS else f"{UNKNOWN}: {word}", LABELS[answer])
        for word, answer in zip(words[~right], answers[~right], strict=True)
    )
    metrics = {
        "accuracy": round(float(right.mean()), 4),
        "keyword_accuracy": round(float(right[spoken].mean()), 4),
        "unknown_accuracy": round(float(right[~spoken].mean()), 4),
        "unheard_word_accuracy": round(float(right[np.isin(words, UNHEARD_WORDS)].mean()), 4),
        "untrained_accent_accuracy": round(float(right[new_accent].mean()), 4),
        "accuracy_per_label": {
            label: round(float(right[labels == index].mean()), 4) for index, label in enumerate(LABELS)
        },
        "confusions": [
            {"said": said, "heard": heard, "times": times}
            for (said, heard), times in confusions.most_common(10)
        ],
        "eval_recordings": len(labels),
        "test_speakers": len({clip.speaker for clip in test}),
        "parameters": _parameters(folder / "model.onnx"),
        **counts,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _parameters(path: Path) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
