"""The repository's two examples as exhibits, with data that their packages are not built on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.precision.exhibit import Exhibit
from examples.recommender import simulator

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_IMPRESSIONS = 40_000


def recommender(folder: Path) -> Exhibit:
    """The ranker; held out are impressions of the same simulated shop that its evaluation data does not hold."""
    home = _EXAMPLES / "recommender"
    heldout = folder / "recommender-heldout.npz"
    folder.mkdir(parents=True, exist_ok=True)
    known = {row.tobytes() for row in np.load(home / "eval.npz")["dense"]}
    shown = simulator.draw(_IMPRESSIONS, "eval")
    fresh = np.array([row.tobytes() not in known for row in shown.dense])
    np.savez(heldout, dense=shown.dense[fresh], ids=shown.ids[fresh], label=shown.label[fresh])
    return Exhibit(
        "recommender",
        "recommender example",
        home / "model.onnx",
        home / "calibration.npz",
        home / "eval.npz",
        heldout,
    )


def speech(folder: Path) -> Exhibit:
    """The keyword spotter; every second recording is built with, the others are held out."""
    home = _EXAMPLES / "speech"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = dict(np.load(home / "eval.npz"))
    paths = folder / "speech-eval.npz", folder / "speech-heldout.npz"
    for first, path in enumerate(paths):
        np.savez(path, **{name: array[first::2] for name, array in arrays.items()})
    return Exhibit("speech", "speech example", home / "model.onnx", home / "calibration.npz", *paths)
