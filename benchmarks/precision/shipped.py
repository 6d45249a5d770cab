"""The repository's two examples as exhibits, with data that their packages are not built on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.precision.exhibit import Exhibit
from examples.recommender import simulator
from examples.speech import dataset, synthesize

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_IMPRESSIONS = 40_000
#: 740 recordings each, made as those of the example's own test.
_EVALUATION_SEEDS, _HELD_OUT_SEEDS = range(1, 6), range(6, 16)
_NOISES, _PAUSE_S = 20, 0.2


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
    """The keyword spotter, on recordings of its test speakers that its own evaluation data does not hold.

    A budget of one answer in a thousand says something only on thousands of them, so more are synthesized.
    """
    home = _EXAMPLES / "speech"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "speech-eval.npz", folder / "speech-heldout.npz"
    known = set(synthesize.plan("test"))
    for path, seeds in zip(paths, (_EVALUATION_SEEDS, _HELD_OUT_SEEDS), strict=True):
        if not path.exists():
            parts = [_recordings(folder / "speech-clips", seed, known) for seed in seeds]
            joined = dataset.Dataset(
                [one for part in parts for one in part.features],
                np.concatenate([part.labels for part in parts]),
            )
            dataset.save(path, joined, labelled=True)
    return Exhibit("speech", "speech example", home / "model.onnx", home / "calibration.npz", *paths)


def _recordings(cache: Path, seed: int, known: set[synthesize.Clip]) -> dataset.Dataset:
    """What the test split holds with another seed, without the clips in `known`, to which these are added."""
    clips = [clip for clip in synthesize.plan("test", seed) if clip not in known]
    known.update(clips)
    paths = synthesize.synthesize(clips, cache, f"speaking, {seed}")
    return dataset.record(
        clips,
        paths,
        copies=1,
        throats=False,
        noises=_NOISES,
        pause_s=_PAUSE_S,
        seed=seed,
        title=f"recording, {seed}",
    )
