"""The recommender's simulator, its committed model and data, and its front end."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from examples.recommender import frontend, scoring, simulator

FOLDER = Path(frontend.__file__).parent
METRICS = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(FOLDER / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="module")
def evaluation() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "eval.npz", allow_pickle=False) as file:
        return dict(file)


def run(session: onnxruntime.InferenceSession, dense: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return session.run(["score"], {"dense": dense, "ids": ids})[0]


# The simulator


def test_the_same_seed_draws_the_same_impressions_and_another_seed_others() -> None:
    once, again = simulator.draw(500, "train"), simulator.draw(500, "train")
    other = simulator.draw(500, "train", seed=21)
    for name in ("dense", "ids", "planted", "label"):
        np.testing.assert_array_equal(getattr(once, name), getattr(again, name))
    assert (once.ids != other.ids).any()


def test_no_pair_of_user_and_item_lies_in_two_splits() -> None:
    pairs = {
        split: {tuple(row) for row in simulator.draw(20_000, split).ids[:, :2]}
        for split in ("train", "validation", "eval")
    }
    assert not pairs["train"] & pairs["eval"]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["eval"]


def test_every_id_is_inside_its_field_and_every_feature_is_finite() -> None:
    shown = simulator.draw(20_000, "train")
    assert shown.dense.dtype == np.float32
    assert shown.ids.dtype == np.int64
    assert shown.dense.shape == (20_000, len(simulator.DENSE))
    assert np.isfinite(shown.dense).all()
    assert shown.ids.min() >= 1
    assert (shown.ids <= list(simulator.FIELDS.values())).all()
    # Short contexts are seen whole, so none of their rows stays untrained.
    for column, name in enumerate(simulator.FIELDS):
        if name not in ("user", "item"):
            assert len(np.unique(shown.ids[:, column])) == simulator.FIELDS[name]


def test_clicks_come_as_often_as_their_planted_probability_says() -> None:
    shown = simulator.draw(60_000, "train")
    for low in np.arange(0, 0.9, 0.1):
        within = (shown.planted >= low) & (shown.planted < low + 0.1)
        expected = shown.planted[within].mean()
        spread = np.sqrt(expected * (1 - expected) / within.sum())
        assert abs(shown.label[within].mean() - expected) < 4 * spread + 0.01


def test_candidates_are_different_items_for_one_user_at_one_moment() -> None:
    shown = simulator.candidates(42)
    assert shown.dense.shape == (500, len(simulator.DENSE))
    assert len(np.unique(shown.ids[:, 1])) == 500
    names = list(simulator.FIELDS)
    for name in ("user", "hour", "weekday", "device", "region"):
        assert len(np.unique(shown.ids[:, names.index(name)])) == 1
    assert (shown.ids[:, 0] == 42).all()
    assert len(np.unique(shown.dense[:, simulator.DENSE.index("position")])) == 1


@pytest.mark.parametrize(("user", "count"), [(0, 500), (2001, 500), (-1, 500), (42, 0), (42, 2001)])
def test_candidates_refuse_users_and_counts_that_the_shop_does_not_have(user: int, count: int) -> None:
    with pytest.raises(ValueError, match="choose"):
        simulator.candidates(user, count)


# Scoring


def test_auc_and_log_loss_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    label = rng.integers(0, 2, 2000)
    score = np.round(np.clip(rng.random(2000) + 0.2 * label, 0, 1), 2)  # rounded: many ties
    assert scoring.auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    inside = np.clip(score, 0.01, 0.99)
    assert scoring.log_loss(label, inside) == pytest.approx(log_loss(label, inside), abs=1e-12)


def test_auc_of_one_label_alone_is_an_error() -> None:
    with pytest.raises(ValueError, match="both labels"):
        scoring.auc(np.ones(4), np.arange(4.0))


# The committed model and data


def test_the_committed_model_reaches_the_auc_of_its_metrics_file(
    session: onnxruntime.InferenceSession, evaluation: dict[str, np.ndarray]
) -> None:
    score = run(session, evaluation["dense"], evaluation["ids"])[:, 0]
    assert len(score) == METRICS["samples"]["eval"]
    assert roc_auc_score(evaluation["label"], score) == pytest.approx(METRICS["eval"]["auc"], abs=1e-3)
    assert log_loss(evaluation["label"], score) == pytest.approx(METRICS["eval"]["log_loss"], abs=1e-3)


def test_the_evaluation_data_are_what_the_simulator_draws_and_the_planted_auc_follows(
    evaluation: dict[str, np.ndarray],
) -> None:
    held_out = simulator.draw(METRICS["samples"]["held_out"], "eval")
    count = METRICS["samples"]["eval"]
    np.testing.assert_allclose(evaluation["dense"], held_out.dense[:count], atol=2e-3)
    np.testing.assert_array_equal(evaluation["ids"], held_out.ids[:count])
    planted = roc_auc_score(evaluation["label"], held_out.planted[:count])
    assert planted == pytest.approx(METRICS["eval"]["planted_auc"], abs=1e-3)


def test_the_model_is_near_the_planted_truth_and_below_it() -> None:
    held_out = METRICS["held_out"]
    assert 0.80 <= held_out["planted_auc"] <= 0.85
    assert held_out["planted_auc"] - 0.015 < held_out["auc"] < held_out["planted_auc"]


def test_the_readme_states_the_measured_figures() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("eval", "held_out"):
        for name in ("auc", "planted_auc", "log_loss", "planted_log_loss"):
            assert f"{METRICS[part][name]:.4f}" in readme


def test_calibration_data_carry_exactly_the_models_inputs(session: onnxruntime.InferenceSession) -> None:
    with np.load(FOLDER / "calibration.npz", allow_pickle=False) as file:
        data = dict(file)
    assert {i.name: i.type for i in session.get_inputs()} == {
        "dense": "tensor(float)",
        "ids": "tensor(int64)",
    }
    assert list(data) == [i.name for i in session.get_inputs()]
    assert data["dense"].shape == (METRICS["samples"]["calibration"], len(simulator.DENSE))
    assert data["ids"].shape == (METRICS["samples"]["calibration"], len(simulator.FIELDS))
    assert (simulator.split_of(data["ids"][:, 0] - 1, data["ids"][:, 1] - 1) > 1).all()


def test_an_answer_does_not_depend_on_the_batch_it_is_in(
    session: onnxruntime.InferenceSession, evaluation: dict[str, np.ndarray]
) -> None:
    dense, ids = evaluation["dense"][:33], evaluation["ids"][:33]
    together = run(session, dense, ids)
    alone = np.concatenate([run(session, dense[i : i + 1], ids[i : i + 1]) for i in range(33)])
    assert together.shape == (33, 1)
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_an_id_outside_its_table_is_scored_as_unknown(
    session: onnxruntime.InferenceSession, evaluation: dict[str, np.ndarray]
) -> None:
    dense, ids = evaluation["dense"][:3].repeat(4, axis=0), evaluation["ids"][:3].repeat(4, axis=0)
    ids[1::4, 1] = 0
    ids[2::4, 1] = simulator.FIELDS["item"] + 1
    ids[3::4, 1] = -7
    score = run(session, dense, ids).reshape(3, 4)
    assert (score[:, 1] != score[:, 0]).all()
    np.testing.assert_allclose(score[:, 2:], score[:, 1:2].repeat(2, axis=1), atol=1e-6)


def test_the_committed_weights_give_the_same_scores_in_pytorch(
    session: onnxruntime.InferenceSession, evaluation: dict[str, np.ndarray]
) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is needed for training alone")
    onnx = pytest.importorskip("onnx")
    from examples.recommender.model import Ranker

    graph = onnx.load(FOLDER / "model.onnx").graph
    ranker = Ranker(len(simulator.DENSE), list(simulator.FIELDS.values())).eval()
    weights = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    ranker.load_state_dict({name: weights[name] for name in ranker.state_dict()})
    dense, ids = evaluation["dense"][:512], evaluation["ids"][:512]
    with torch.inference_mode():
        expected = ranker(torch.from_numpy(dense), torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(run(session, dense, ids), expected, atol=1e-6)


def test_equalizing_changes_no_score_and_brings_the_vectors_to_one_range() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is needed for training alone")
    from examples.recommender.model import Ranker

    torch.manual_seed(5)
    ranker = Ranker(13, [30, 40, 5]).eval()
    dense, ids = torch.randn(200, 13), torch.randint(0, 6, (200, 3))
    with torch.inference_mode():
        ranker.tables[1].weight *= 20
        before = ranker(dense, ids)
        spread_before = ranker.interacting(dense, ids).abs().amax((0, 2))
    ranker.equalize(dense, ids)
    with torch.inference_mode():
        spread = ranker.interacting(dense, ids).abs().amax((0, 2))
        np.testing.assert_allclose(ranker(dense, ids).numpy(), before.numpy(), atol=1e-6)
    assert spread_before.max() > 15 * spread_before.min()
    assert spread.max() < 3 * spread.min()


def test_the_committed_tables_share_one_range_so_that_int8_keeps_them() -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(FOLDER / "model.onnx").graph
    peaks = [
        float(np.abs(onnx.numpy_helper.to_array(tensor)).max())
        for tensor in graph.initializer
        if tensor.name.startswith("tables.")
    ]
    assert len(peaks) == len(simulator.FIELDS)
    assert max(peaks) < 3 * min(peaks)


def test_the_folder_stays_small_enough_to_clone() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert (FOLDER / "model.onnx").stat().st_size < 2_000_000
    assert sum(path.stat().st_size for path in files) < 3_000_000


# The front end

Answer = tuple[int, bytes]


@contextmanager
def listening(reply: Callable[[bytes], Answer]) -> Iterator[str]:
    """A real HTTP server on this machine that answers `POST /v1/predict` with `reply(body)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = reply(body) if self.path == "/v1/predict" else (404, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing: the test's output is pytest's."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_request_carries_every_feature_exactly() -> None:
    shown = simulator.candidates(7, 20)
    request = json.loads(frontend.request_body(shown, "int8"))
    assert request["model"] == "ranker"
    assert request["precision"] == "int8"
    np.testing.assert_array_equal(np.asarray(request["inputs"]["dense"], dtype=np.float32), shown.dense)
    np.testing.assert_array_equal(np.asarray(request["inputs"]["ids"]), shown.ids)
    assert "precision" not in json.loads(frontend.request_body(shown))


def test_the_best_items_come_first_and_equal_scores_keep_their_order() -> None:
    shown = simulator.candidates(7, 5)
    top = frontend.best(shown, np.array([0.1, 0.9, 0.3, 0.9, 0.2]), count=3)
    assert [line.item for line in top] == shown.ids[[1, 3, 2], 1].tolist()
    assert [line.place for line in top] == [1, 2, 3]
    assert [line.score for line in top] == [0.9, 0.9, 0.3]
    assert [line.planted for line in top] == shown.planted[[1, 3, 2]].tolist()
    assert top[0].category == simulator.CATEGORIES[shown.ids[1, 2] - 1]


def test_the_front_end_prints_ten_items_that_the_planted_truth_likes_too(
    session: onnxruntime.InferenceSession, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: bytes) -> Answer:
        inputs = json.loads(body)["inputs"]
        score = run(session, np.asarray(inputs["dense"], np.float32), np.asarray(inputs["ids"], np.int64))
        timing = {"queue_ms": 0.4, "compute_ms": 1.25, "batch_size": 512}
        answer = {"model": "ranker", "version": "3", "precision": "int8", "timing": timing}
        return 200, json.dumps(answer | {"outputs": {"score": score.tolist()}}).encode()

    with listening(reply) as url:
        assert frontend.main(["--user", "42", "--url", url]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line[:3].strip().isdigit()]
    assert [row[0] for row in rows] == [str(place) for place in range(1, 11)]
    scores = [float(row[3]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    planted = [float(row[4]) for row in rows]
    assert np.mean(planted) > np.quantile(simulator.candidates(42).planted, 0.9)
    assert "ranker version 3, int8" in printed
    assert "round trip" in printed
    assert "queue 0.4 ms, compute 1.2 ms in a batch of 512" in printed


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (429, b'{"error": "retry in 1 s", "code": "queue_full"}', "429 queue_full: retry in 1 s"),
        (502, b"<html>bad gateway</html>", "answered 502"),
        (500, b"[]", "answered 500"),
        (200, b"<html>hello</html>", "did not answer in JSON"),
        (200, b"\xff\xfe\xfa", "did not answer in JSON"),
        (200, b'{"outputs": {"other": [[1.0]]}}', "no output 'score'"),
        (200, b'["score"]', "no output 'score'"),
        (200, b'{"outputs": {"score": [[0.5]]}}', "Asked for 500 scores"),
    ],
)
def test_a_bad_answer_becomes_one_sentence_and_exit_code_1(
    status: int, content: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(lambda _: (status, content)) as url:
        assert frontend.main(["--url", url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "", "http://[::1"])
def test_an_unreachable_service_becomes_one_sentence(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontend.main(["--url", scheme.format(port=unused_port())]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("No service answers at")
    assert "make serve" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_silent_service_is_given_up_after_the_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert frontend.main(["--url", url, "--timeout", "0.2"]) == 1
    assert "did not answer within 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--user", "0"], ["--user", "x"], ["--candidates", "9999"], ["--timeout", "0"], ["--timeout", "nan"]],
)
def test_a_wrong_command_line_ends_with_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        frontend.main(arguments)
    assert ended.value.code == 2
