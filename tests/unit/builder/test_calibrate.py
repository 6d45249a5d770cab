"""Calibration: what the ranges are, that they are resumable, and that `best` is the best."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.support.quantized_graphs import largest_ranges, values_of
from tests.unit.builder import architectures
from tests.unit.builder.architectures import ALL, I64, F, data, node
from tests.unit.builder.models import make_model, weights
from vernier.builder.graphs.prepare import clean
from vernier.builder.nodes.placement import quantizable_nodes
from vernier.builder.progress import NoProgress
from vernier.builder.quantizing.calibrate import METHODS, Ranges, calibrate
from vernier.builder.quantizing.counting import model_digest
from vernier.builder.quantizing.rehearsal import SwitchableQdq, damage
from vernier.builder.samples.data import ArraySamples
from vernier.errors import BuildError, ResumeError
from vernier.tensors import Arrays


@pytest.mark.parametrize("kind", ALL)
def test_minmax_is_the_largest_magnitude_of_every_activation(kind: str) -> None:
    model = ALL[kind]()
    nodes, samples = quantizable_nodes(model), data(model, 40)
    ranges = calibrate(model, nodes, samples, "minmax")
    expected = largest_ranges(nodes, values_of(model, samples.take(range(40))))
    assert ranges.scales.keys() == expected.keys()
    for name, scale in ranges.scales.items():
        assert scale == pytest.approx(expected[name], rel=0.01)
    assert ranges.samples == 40
    assert set(ranges.per_tensor_method.values()) == {"minmax"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_every_activation_a_positive_scale(method: str) -> None:
    model = architectures.transformer()
    nodes = quantizable_nodes(model)
    ranges = calibrate(model, nodes, data(model), method)  # type: ignore[arg-type]
    assert set(ranges.scales) == {a for node in nodes for a in node.activations}
    assert all(0 < scale < 10 for scale in ranges.scales.values())
    assert ranges.method == method


def test_calibrating_twice_gives_the_same_numbers() -> None:
    model = architectures.residual_cnn()
    nodes, samples = quantizable_nodes(model), data(model)
    assert calibrate(model, nodes, samples) == calibrate(model, nodes, samples)


def test_best_is_no_worse_for_the_outputs_than_any_single_method() -> None:
    model = architectures.residual_cnn()
    nodes = quantizable_nodes(model)
    spiky = data(model, 96).take(range(96))
    spiky["x"][::7, 0, 0, 0] = 60.0  # a rare outlier in the input, which carries no information
    samples = ArraySamples(spiky)
    switchable = SwitchableQdq(model, nodes)
    exact = switchable.remember(samples, 32)

    def harm(ranges: Ranges) -> float:
        return damage(exact, switchable.run(ranges.scales))

    best = harm(calibrate(model, nodes, samples, "best"))
    for method in ("minmax", "entropy", "percentile", "mse"):
        assert best <= 1.1 * harm(calibrate(model, nodes, samples, method))


def test_switchable_qdq_without_scales_is_the_model_itself() -> None:
    model = architectures.transformer()
    nodes, samples = quantizable_nodes(model), data(model, 8)
    switchable = SwitchableQdq(model, nodes)
    exact = values_of(model, samples.take(range(8)))["y"].reshape(8, -1)
    assert np.allclose(switchable.remember(samples, 4)["y"], exact, atol=1e-5)
    assert np.allclose(switchable.run({})["y"], exact, atol=1e-5)
    off = switchable.run({"l1": 0.5})["y"]
    assert np.abs(off - exact).max() > 0.01


def test_a_model_that_cannot_be_cut_is_calibrated_and_stays_as_it_was() -> None:
    nodes = [node("MatMul", ["x", "w"], "y")]
    model = make_model(nodes, {"x": (F, ["n", 64])}, {"y": (F, ["n", 4])}, {"w": weights(64, 4)})
    model = clean(model, {}, [])
    before = model.SerializeToString(deterministic=True)
    # Heavy tails: the methods disagree, so that the model's outputs decide between them.
    x = np.random.default_rng(0).standard_t(1.5, (5000, 64)).astype(np.float32)
    ranges = calibrate(model, quantizable_nodes(model), ArraySamples({"x": x}), "best")
    assert ranges.scales.keys() == {"x"}
    assert model.SerializeToString(deterministic=True) == before


def test_damage_counts_the_worst_sample_and_what_is_not_finite() -> None:
    exact = {"y": np.random.default_rng(0).standard_normal((50, 4))}
    spread_out = {"y": exact["y"] + 0.01}
    one_broken = {"y": exact["y"].copy()}
    one_broken["y"][7] += 0.01 * np.sqrt(50)
    assert damage(exact, exact) == 0
    assert damage(exact, one_broken) > 1.5 * damage(exact, spread_out)
    one_broken["y"][7] = np.nan
    assert damage(exact, one_broken) == np.inf


class Interrupted(ArraySamples):
    """Fails after some samples; counts how many were handed out."""

    def __init__(self, arrays: Arrays, fail_at: int) -> None:
        super().__init__(arrays)
        self.fail_at = fail_at
        self.handed = 0

    def _hand(self, batch: Arrays) -> Arrays:
        self.handed += len(batch["x"])
        if self.handed > self.fail_at:
            raise KeyboardInterrupt
        return batch

    def batches(self, rows: int) -> Iterator[Arrays]:
        for batch in super().batches(rows):
            yield self._hand(batch)

    def take(self, indices: Sequence[int]) -> Arrays:
        return super().take(indices) if len(indices) == 1 else self._hand(super().take(indices))


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path: Path) -> None:
    model = architectures.residual_cnn()
    nodes, state = quantizable_nodes(model), tmp_path / "state"
    arrays = data(model, 400).take(range(400))
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, nodes, Interrupted(arrays, 250), "mse", resume=state)
    assert state.exists()
    rest = Interrupted(arrays, 10_000)
    resumed = calibrate(model, nodes, rest, "mse", resume=state)
    assert rest.handed <= 250
    assert not state.exists()
    assert resumed == calibrate(model, nodes, ArraySamples(arrays), "mse")


def test_a_calibration_interrupted_after_the_last_sample_counts_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architectures.residual_cnn()
    nodes, state, samples = quantizable_nodes(model), tmp_path / "state", data(model, 40)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vernier.builder.quantizing.calibrate._choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, nodes, samples, "best", resume=state)
    watched = Interrupted(samples.take(range(40)), 0)
    assert calibrate(model, nodes, watched, "mse", resume=state) == calibrate(model, nodes, samples, "mse")
    assert watched.handed == 0
    assert not state.exists()


@pytest.mark.parametrize("change", ["model", "data"])
def test_the_state_of_another_run_is_neither_used_nor_lost(tmp_path: Path, change: str) -> None:
    model = architectures.residual_cnn()
    nodes, state = quantizable_nodes(model), tmp_path / "state"
    arrays = data(model, 200).take(range(200))
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, nodes, Interrupted(arrays, 150), "minmax", resume=state)
    kept = state.read_bytes()
    if change == "model":
        model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    else:
        arrays = {"x": arrays["x"] * 2}
    with pytest.raises(ResumeError, match="keeps the calibration of another build"):
        calibrate(model, nodes, ArraySamples(arrays), "minmax", resume=state)
    assert state.read_bytes() == kept


def test_a_damaged_state_starts_the_calibration_anew(tmp_path: Path) -> None:
    model = architectures.residual_cnn()
    nodes, state = quantizable_nodes(model), tmp_path / "state"
    arrays = data(model, 200).take(range(200))
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, nodes, Interrupted(arrays, 150), "minmax", resume=state)
    state.write_bytes(state.read_bytes()[:100])
    resumed = calibrate(model, nodes, ArraySamples(arrays), "minmax", resume=state)
    assert resumed == calibrate(model, nodes, ArraySamples(arrays), "minmax")
    assert not state.exists()


def test_a_file_that_is_no_state_survives_a_calibration(tmp_path: Path) -> None:
    model = architectures.residual_cnn()
    evaluation = tmp_path / "e.npz"
    np.savez(evaluation, x=np.zeros((2, 3, 8, 8), np.float32))
    kept = evaluation.read_bytes()
    with pytest.raises(ResumeError, match=r"e\.npz holds no calibration state"):
        calibrate(model, quantizable_nodes(model), data(model, 20), resume=evaluation)
    assert calibrate(model, [], data(model, 20), resume=evaluation).scales == {}
    assert evaluation.read_bytes() == kept


def test_a_fixed_batch_and_a_remainder_are_counted_once() -> None:
    model = architectures.residual_cnn()
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 4
    nodes, samples = quantizable_nodes(model), data(model, 10)
    flexible = architectures.residual_cnn()
    assert calibrate(model, nodes, samples, "minmax") == calibrate(flexible, nodes, samples, "minmax")


@pytest.mark.parametrize("last", ["ArgMax", "NonZero"])
def test_outputs_that_cannot_be_compared_leave_the_choice_to_the_squared_error(last: str) -> None:
    attributes = {"axis": 1} if last == "ArgMax" else {}
    nodes = [node("MatMul", ["x", "w"], "h"), node(last, ["h"], "y", **attributes)]
    model = make_model(nodes, {"x": (F, ["n", 4])}, {"y": (I64, None)}, {"w": weights(4, 4)})
    model = clean(model, {}, [])
    x = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    x[0, 0] = 300.0
    ranges = calibrate(model, quantizable_nodes(model), ArraySamples({"x": x}), "best")
    assert ranges.per_tensor_method == {"x": "mse"}


class Generated(ArraySamples):
    """Many samples, none of which exists before it is asked for."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__({"x": np.zeros((1, width), np.float32)})
        self.count, self.width, self.largest = count, width, 0

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> Arrays:
        self.largest = max(self.largest, len(indices))
        return {"x": np.full((len(indices), self.width), 0.5, np.float32)}

    def batches(self, rows: int) -> Iterator[Arrays]:
        for start in range(0, self.count, rows):
            yield self.take(range(start, min(start + rows, self.count)))


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """10,000 samples of 64 KiB are 640 MiB; they pass through a tenth of that."""
    nodes = [node("MatMul", ["x", "w"], "y")]
    model = make_model(nodes, {"x": (F, ["n", 16_384])}, {"y": (F, ["n", 2])}, {"w": weights(16_384, 2)})
    model = clean(model, {}, [])
    samples = Generated(10_000, 16_384)
    tracemalloc.start()
    ranges = calibrate(model, quantizable_nodes(model), samples, "mse")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ranges.samples == 10_000
    assert samples.largest <= 64
    assert peak < 64 << 20


def test_progress_reaches_the_number_of_samples() -> None:
    seen: list[int] = []

    class Counting(NoProgress):
        def task(self, title: str, total: int | None = None):  # type: ignore[no-untyped-def]
            from contextlib import contextmanager

            @contextmanager
            def task():  # type: ignore[no-untyped-def]
                yield seen.append

            return task()

    model = architectures.recommender()
    calibrate(model, quantizable_nodes(model), data(model, 100), "mse", Counting())
    assert sum(seen) == 100


def test_bad_requests_are_refused_in_words() -> None:
    model = architectures.recommender()
    nodes = quantizable_nodes(model)
    with pytest.raises(BuildError, match="'kl' is no calibration method"):
        calibrate(model, nodes, data(model), "kl")  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="no calibration samples"):
        calibrate(model, nodes, ArraySamples({"ids": np.zeros((0, 2), np.int64)}))
    assert calibrate(model, [], data(model)).scales == {}


def test_the_digest_changes_with_graph_and_weights() -> None:
    model, other = architectures.residual_cnn(), architectures.residual_cnn()
    assert model_digest(model) == model_digest(other)
    weight = other.graph.initializer[0]
    weight.raw_data = weight.raw_data[:-1] + b"\x01"
    assert model_digest(model) != model_digest(other)
    third = architectures.residual_cnn()
    third.graph.node[0].name = "another"
    assert model_digest(model) != model_digest(third)
