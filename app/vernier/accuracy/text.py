"""Word and character error rates, and the greedy reading of a CTC output."""

from __future__ import annotations

from typing import List, Sequence

import numpy as np

from vernier.errors import AccuracyError
from vernier.tensors import Array


def edit_distance(reference: Sequence[object], hypothesis: Sequence[object]) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions from one sequence to the other.

    One row of the usual table at a time. Insertions within a row are a running minimum once the
    column's number is subtracted, so no loop over columns is needed.
    """
    if not len(reference) or not len(hypothesis):
        return max(len(reference), len(hypothesis))
    numbers: dict[object, int] = {}
    ref, hyp = (
        np.array([numbers.setdefault(token, len(numbers)) for token in tokens])
        for tokens in (reference, hypothesis)
    )
    columns = np.arange(len(hyp) + 1)
    row = columns.copy()
    for i, token in enumerate(ref, start=1):
        new = np.empty_like(row)
        new[0] = i
        new[1:] = np.minimum(row[1:] + 1, row[:-1] + (hyp != token))
        row = np.minimum.accumulate(new - columns) + columns
    return int(row[-1])


def error_rate(references: Sequence[Sequence[object]], hypotheses: Sequence[Sequence[object]]) -> float:
    """Edits over all sequences divided by the length of all references. Raises AccuracyError for no tokens."""
    if len(references) != len(hypotheses):
        raise AccuracyError(f"{len(references)} references and {len(hypotheses)} answers: give one for each")
    tokens = sum(len(reference) for reference in references)
    if not tokens:
        raise AccuracyError("there is nothing to compare: every reference text is empty")
    return sum(edit_distance(r, h) for r, h in zip(references, hypotheses)) / tokens


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate; words are what white space separates."""
    return error_rate([text.split() for text in references], [text.split() for text in hypotheses])


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate."""
    return error_rate([list(text) for text in references], [list(text) for text in hypotheses])


def ctc_tokens(scores: Array, blank: int = 0) -> List[List[int]]:
    """The greedy reading of [samples, frames, tokens]: best token per frame, repeats joined, blanks dropped."""
    best = np.argmax(scores, axis=-1)
    kept = np.ones(best.shape, dtype=bool)
    kept[:, 1:] = best[:, 1:] != best[:, :-1]
    kept &= best != blank
    return [row[keep].tolist() for row, keep in zip(best, kept)]
