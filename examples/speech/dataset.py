"""Features of the synthesized clips, padded batches of them, and the .npz files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import track

from examples.speech.augment import augment, background, other_throat, trim
from examples.speech.features import BANDS, SAMPLE_RATE_HZ, Floats, log_mel, loudest_span, read_wav, resample
from examples.speech.synthesize import Clip
from examples.speech.words import LABELS, UNKNOWN

_CHUNK = 200


@dataclass(frozen=True)
class Dataset:
    """Recordings as features [frames, 40] each, and their class indices."""

    features: list[Floats]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.features)

    def pick(self, indices: Sequence[int]) -> Dataset:
        return Dataset([self.features[i] for i in indices], self.labels[list(indices)])


def record(
    clips: Sequence[Clip],
    paths: Sequence[Path],
    *,
    copies: int,
    throats: bool,
    noises: int,
    pause_s: float,
    seed: int,
    title: str,
) -> Dataset:
    """Record every clip `copies` times, each time otherwise, and add `noises` recordings with no word in them."""
    chunks = [(start, paths[start : start + _CHUNK]) for start in range(0, len(paths), _CHUNK)]
    recorded: list[list[Floats]] = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        job = partial(_record_chunk, copies=copies, throats=throats, pause_s=pause_s, seed=seed)
        for chunk in track(pool.map(job, chunks), description=title, total=len(chunks)):
            recorded.extend(chunk)
    labels = [clip.label for clip in clips for _ in range(copies)]
    rng = np.random.default_rng([seed, len(paths)])
    for _ in range(noises):
        recorded.append([log_mel(background(int(rng.uniform(0.3, 1.2) * SAMPLE_RATE_HZ), [], rng))])
        labels.append(LABELS.index(UNKNOWN))
    return Dataset([one for several in recorded for one in several], np.array(labels, np.int64))


def _record_chunk(
    chunk: tuple[int, Sequence[Path]], *, copies: int, throats: bool, pause_s: float, seed: int
) -> list[list[Floats]]:
    start, paths = chunk
    rng = np.random.default_rng([seed, start])
    words = [trim(resample(*read_wav(path))) for path in paths]

    def once(word: Floats) -> Floats:
        spoken = other_throat(word, rng) if throats else word
        return log_mel(loudest_span(augment(spoken, words, rng, pause_s)))

    return [[once(word) for _ in range(copies)] for word in words]


def pad(features: Sequence[Floats]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Features [batch, frames of the longest, 40], zero after each clip's end, and lengths [batch]."""
    lengths = np.array([len(one) for one in features], np.int64)
    padded = np.zeros((len(features), int(lengths.max()), BANDS), np.float32)
    for row, one in zip(padded, features, strict=True):
        row[: len(one)] = one
    return padded, lengths


def save(path: Path, dataset: Dataset, *, labelled: bool) -> None:
    """Write the arrays under the model's input names, with the labels as `label` where wanted."""
    features, lengths = pad(dataset.features)
    arrays: dict[str, npt.NDArray[np.generic]] = {"features": features, "lengths": lengths}
    if labelled:
        arrays["label"] = dataset.labels
    np.savez_compressed(path, allow_pickle=False, **arrays)
