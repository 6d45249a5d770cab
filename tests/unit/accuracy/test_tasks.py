"""Task metrics equal scikit-learn's and jiwer's, and the task is read off labels and outputs."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
import sklearn.metrics as sk

from vernier.accuracy import cer, ctc_tokens, find_task, task_metric, wer
from vernier.errors import AccuracyError

RANDOM = np.random.default_rng(5)
LABELS = RANDOM.integers(0, 2, 300)
SCORES = (RANDOM.normal(size=300) + LABELS).astype(np.float32)
PROBABILITIES = (1 / (1 + np.exp(-SCORES))).astype(np.float32)
CLASSES = RANDOM.integers(0, 5, 300)
LOGITS = (RANDOM.normal(size=(300, 5)) + 2 * np.eye(5)[CLASSES]).astype(np.float32)
SOFTMAX = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(axis=1, keepdims=True)


def test_auc_is_scikit_learns_also_with_ties() -> None:
    for scores in (SCORES, np.round(SCORES)):
        expected = sk.roc_auc_score(LABELS, scores)
        assert task_metric("auc", {"y": scores}, LABELS) == pytest.approx(expected)
        assert task_metric(
            "auc", {"y": scores[:, None]}, LABELS[:, None].astype(np.float32)
        ) == pytest.approx(expected)
        assert task_metric("auc", {"y": np.stack([-scores, scores], 1)}, LABELS) == pytest.approx(expected)


def test_auc_of_several_labels_is_scikit_learns_macro_mean() -> None:
    labels = RANDOM.integers(0, 2, (300, 4))
    scores = RANDOM.normal(size=(300, 4)) + labels
    expected = sk.roc_auc_score(labels, scores, average="macro")
    assert task_metric("auc", {"y": scores}, labels) == pytest.approx(expected)


def test_accuracy_and_f1_are_scikit_learns() -> None:
    predicted = LOGITS.argmax(axis=1)
    assert task_metric("accuracy", {"y": LOGITS}, CLASSES) == sk.accuracy_score(CLASSES, predicted)
    assert task_metric("f1", {"y": LOGITS}, CLASSES) == pytest.approx(
        sk.f1_score(CLASSES, predicted, average="macro")
    )
    for scores in (SCORES, PROBABILITIES):
        assert task_metric("accuracy", {"y": scores}, LABELS) == sk.accuracy_score(LABELS, SCORES > 0)
        assert task_metric("f1", {"y": scores}, LABELS) == pytest.approx(sk.f1_score(LABELS, SCORES > 0))
    assert task_metric("accuracy", {"y": predicted}, CLASSES) == sk.accuracy_score(CLASSES, predicted)


def test_log_loss_is_scikit_learns_for_probabilities_and_logits() -> None:
    binary = sk.log_loss(LABELS, PROBABILITIES.astype(np.float64))
    assert task_metric("log_loss", {"y": PROBABILITIES}, LABELS) == pytest.approx(binary)
    assert task_metric("log_loss", {"y": SCORES}, LABELS) == pytest.approx(binary, rel=1e-6)
    many = sk.log_loss(CLASSES, SOFTMAX)
    assert task_metric("log_loss", {"y": SOFTMAX}, CLASSES) == pytest.approx(many, rel=1e-6)
    assert task_metric("log_loss", {"y": LOGITS}, CLASSES) == pytest.approx(many, rel=1e-6)


def test_rmse_is_scikit_learns() -> None:
    wanted = RANDOM.normal(size=(50, 3))
    given = wanted + 0.1 * RANDOM.normal(size=(50, 3))
    assert task_metric("rmse", {"y": given}, wanted) == pytest.approx(
        sk.root_mean_squared_error(wanted.ravel(), given.ravel())
    )


def test_error_rates_are_jiwers() -> None:
    words = ["turn", "left", "right", "on", "off", "the", "light", "stop"]
    references = [" ".join(RANDOM.choice(words, RANDOM.integers(1, 9))) for _ in range(60)]
    hypotheses = []
    for text in references:
        kept = [w for w in text.split() if RANDOM.random() > 0.2]
        hypotheses.append(" ".join([*kept, *RANDOM.choice(words, RANDOM.integers(0, 3))]))
    assert wer(references, hypotheses) == pytest.approx(jiwer.wer(references, hypotheses))
    assert cer(references, hypotheses) == pytest.approx(jiwer.cer(references, hypotheses))


def test_token_error_rate_reads_ctc_outputs_as_jiwer_reads_their_text() -> None:
    frames = RANDOM.integers(0, 6, (20, 30))
    labels = np.full((20, 12), -1)
    for row in labels:
        length = RANDOM.integers(1, 12)
        row[:length] = RANDOM.integers(1, 6, length)
    texts = [" ".join(str(t) for t in row if t >= 0) for row in labels]
    read = [" ".join(map(str, tokens)) for tokens in ctc_tokens(np.eye(6)[frames])]
    expected = jiwer.wer(texts, read)
    assert task_metric("wer", {"y": np.eye(6, dtype=np.float32)[frames]}, labels) == pytest.approx(expected)


def test_ctc_joins_repeats_and_drops_blanks() -> None:
    assert ctc_tokens(np.eye(4)[[[0, 1, 1, 0, 1, 2, 2, 0, 0]]]) == [[1, 1, 2]]


@pytest.mark.parametrize(
    ("outputs", "labels", "metric", "output"),
    [
        ({"score": SCORES[:, None]}, LABELS, "auc", "score"),
        ({"p": SOFTMAX[:, :2]}, LABELS, "auc", "p"),
        ({"embedding": RANDOM.normal(size=(300, 64, 3)), "p": SOFTMAX}, CLASSES, "accuracy", "p"),
        ({"p": SOFTMAX}, np.eye(5)[CLASSES], "accuracy", "p"),
        ({"p": RANDOM.random((300, 5))}, RANDOM.integers(0, 2, (300, 5)), "auc", "p"),
        ({"mask": RANDOM.normal(size=(4, 3, 6, 5))}, RANDOM.integers(0, 3, (4, 6, 5)), "accuracy", "mask"),
        ({"tags": RANDOM.normal(size=(4, 6, 3))}, RANDOM.integers(0, 3, (4, 6)), "accuracy", "tags"),
        ({"value": SCORES}, SCORES + 0.5, "rmse", "value"),
        ({"text": RANDOM.normal(size=(4, 50, 30))}, RANDOM.integers(0, 30, (4, 9)), "wer", "text"),
        ({"class": CLASSES}, CLASSES, "accuracy", "class"),
    ],
)
def test_the_task_follows_from_labels_and_output_shapes(outputs, labels, metric, output) -> None:
    task = find_task(outputs, labels)
    assert (task.metric, task.output) == (metric, output)
    assert np.isfinite(task.measure(outputs, labels))


def test_a_task_reads_every_variant_as_it_read_fp32() -> None:
    task = find_task({"y": PROBABILITIES}, LABELS, "accuracy")
    slightly_above_one = PROBABILITIES.copy()
    slightly_above_one[0] = 1.2
    # Read as logits, every answer would count as positive.
    assert task.measure({"y": slightly_above_one}, LABELS) == pytest.approx(
        task.measure({"y": PROBABILITIES}, LABELS), abs=1 / 300
    )


def test_positions_labelled_below_zero_are_padding() -> None:
    logits = np.eye(3)[[[0, 1, 2, 2]]]
    assert task_metric("accuracy", {"y": logits}, np.array([[0, 1, -1, -100]])) == 1.0
    assert task_metric("accuracy", {"y": logits}, np.array([[0, 0, -1, -1]])) == 0.5
    with pytest.raises(AccuracyError, match="padding"):
        task_metric("accuracy", {"y": logits}, np.full((1, 4), -1))


@pytest.mark.parametrize("metric", ["auc", "accuracy", "f1", "log_loss"])
def test_a_non_finite_output_has_no_task_metric(metric: str) -> None:
    broken = SCORES.copy()
    broken[7] = np.nan
    assert np.isnan(task_metric(metric, {"y": broken}, LABELS))


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        ({"y": SCORES}, LABELS[:10]),
        ({"y": SCORES[:0]}, LABELS[:0]),
        ({"y": SCORES}, np.array(["a"] * 300)),
        ({"y": RANDOM.normal(size=(300, 7, 9))}, LABELS),
    ],
)
def test_labels_that_fit_no_output_are_an_error(outputs, labels) -> None:
    with pytest.raises(AccuracyError, match="fit no output"):
        find_task(outputs, labels)


@pytest.mark.parametrize(
    ("metric", "output", "labels", "says"),
    [
        ("auc", SCORES, np.ones(300, int), "both kinds"),
        ("auc", SCORES, CLASSES, "use accuracy"),
        ("auc", SOFTMAX, LABELS, "one or two values"),
        ("accuracy", SCORES, LABELS[:10], "one label for each"),
        ("accuracy", SOFTMAX, CLASSES[:, None] * np.ones((1, 3)), "no classes"),
        ("accuracy", SCORES, np.where(LABELS, np.nan, 0.0), "finite numbers"),
        ("accuracy", SCORES[:0], LABELS[:0], "nothing to compare"),
        ("wer", SCORES, LABELS, "samples, tokens"),
        ("recall", SCORES, LABELS, "no task metric"),
    ],
)
def test_a_metric_that_labels_or_output_do_not_fit_is_an_error(metric, output, labels, says: str) -> None:
    with pytest.raises(AccuracyError, match=says):
        task_metric(metric, {"y": output}, labels, "y")


def test_error_rates_of_nothing_are_an_error() -> None:
    with pytest.raises(AccuracyError, match="nothing to compare"):
        wer(["", ""], ["a", "b"])
    with pytest.raises(AccuracyError, match="one for each"):
        wer(["a"], [])
