"""The keyword spotter: its committed model and data, its features, its vocabulary and its front end."""

from __future__ import annotations

import io
import json
import socket
import threading
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from examples.speech import augment, features, frontend, synthesize, words

FOLDER = Path(frontend.__file__).parent
METRICS = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))
HELLO = FOLDER / "hello.wav"


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


def probabilities(
    session: onnxruntime.InferenceSession, clips: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    return session.run(["probabilities"], {"features": clips, "lengths": lengths})[0]


def tone(hertz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav(data: bytes, *, channels: int = 1, width: int = 2, rate: int = 16_000) -> io.BytesIO:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)
    buffer.seek(0)
    return buffer


# The committed model and data


def test_model_is_as_accurate_on_unseen_voices_as_metrics_json_says(session, evaluation):
    answers = probabilities(session, evaluation["features"], evaluation["lengths"]).argmax(axis=1)
    assert np.mean(answers == evaluation["label"]) == pytest.approx(METRICS["accuracy"], abs=1e-3)
    assert METRICS["accuracy"] >= 0.9


def test_padding_never_changes_an_answer(session, evaluation):
    rows = np.arange(0, len(evaluation["lengths"]), 30)
    clips, lengths = evaluation["features"][rows].copy(), evaluation["lengths"][rows]
    padded = probabilities(session, clips, lengths)
    for row, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        alone = probabilities(session, clip[None, :length], lengths[row : row + 1])
        np.testing.assert_allclose(padded[row], alone[0], atol=2e-6)
        clip[length:] = 7.0  # and what stands in the padding does not matter
    np.testing.assert_allclose(probabilities(session, clips, lengths), padded, atol=2e-6)


def test_a_clip_without_a_single_frame_of_sound_gets_a_finite_answer(session):
    answer = probabilities(session, np.ones((1, 20, 40), np.float32), np.zeros(1, np.int64))
    assert answer.sum() == pytest.approx(1.0, abs=1e-5)


def test_model_has_the_documented_interface_and_fits_old_runtimes():
    model = onnx.load(FOLDER / "model.onnx")
    assert model.ir_version <= 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 17}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "features": ["batch", "frames", 40],
        "lengths": ["batch"],
        "probabilities": ["batch", len(words.LABELS)],
    }


def test_committed_files_are_small_and_complete(evaluation):
    with np.load(FOLDER / "calibration.npz", allow_pickle=False) as file:
        calibration = dict(file)
    assert set(calibration) == {"features", "lengths"}
    assert set(evaluation) == {"features", "lengths", "label"}
    for data, fewest in ((calibration, 256), (evaluation, 600)):
        assert data["features"].dtype == np.float32
        assert data["lengths"].dtype == np.int64
        assert len(data["features"]) == len(data["lengths"]) >= fewest
        assert data["lengths"].max() == data["features"].shape[1]
    assert evaluation["label"].dtype == np.int64
    assert set(evaluation["label"]) == set(range(len(words.LABELS)))
    assert (FOLDER / "model.onnx").stat().st_size < 2_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 8_000_000


def test_labels_file_names_the_classes_in_order():
    assert tuple(frontend.load_labels()) == words.LABELS


# Features


def test_bundled_recording_says_hello(session):
    clip = features.features_of(HELLO)
    answer = probabilities(session, clip[None], np.array([len(clip)]))[0]
    assert words.LABELS[answer.argmax()] == "hello"
    assert answer.max() > 0.8


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_tone_and_its_level(rate):
    heard = features.resample(tone(1_000, rate), rate)
    assert len(heard) == features.SAMPLE_RATE_HZ
    np.testing.assert_allclose(heard[500:-500], tone(1_000, features.SAMPLE_RATE_HZ)[500:-500], atol=2e-3)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    heard = features.resample(tone(11_000, 44_100), 44_100)
    assert np.abs(heard[500:-500]).max() < 0.005


def test_a_tone_lights_the_band_it_lies_in():
    for hertz in (200.0, 1_000.0, 4_000.0):
        clip = features.log_mel(tone(hertz, features.SAMPLE_RATE_HZ))
        nearest = int(np.argmax(features.mel_filters()[:, round(hertz / 31.25)]))
        assert abs(int(clip.mean(axis=0).argmax()) - nearest) <= 1


def test_loudness_does_not_change_the_features():
    samples, rate = features.read_wav(HELLO)
    loud = features.log_mel(features.resample(samples, rate))
    quiet = features.log_mel(features.resample(samples * np.float32(0.05), rate))
    np.testing.assert_allclose(loud, quiet, atol=0.01)


@pytest.mark.parametrize("samples", [1, 100, 400, 560, 16_000])
def test_silence_of_any_length_has_finite_features_all_alike(samples):
    clip = features.log_mel(np.zeros(samples, np.float32))
    assert clip.shape == (1 + max(0, samples - 400) // 160, 40)
    assert np.isfinite(clip).all()
    assert np.all(clip == clip[0, 0])
    assert clip[0, 0] <= 0.0  # far below a clip's loudest point, which is 2


def test_the_word_is_cut_out_of_a_long_recording():
    noise = np.random.default_rng(0).standard_normal(16_000 * 10).astype(np.float32) * 0.001
    word = tone(440, 16_000, 0.5)
    noise[100_000:108_000] += word
    span = features.loudest_span(noise)
    assert len(span) == features.LONGEST_S * 16_000
    assert np.corrcoef(span[12_000:20_000], word)[0, 1] > 0.99  # whole, and in the middle
    assert features.loudest_span(word) is word


@pytest.mark.parametrize(("width", "dtype"), [(1, None), (2, "<i2"), (3, None), (4, "<i4")])
def test_every_pcm_width_and_stereo_read_alike(width, dtype):
    expected = tone(300, 16_000, 0.1)
    full = 2 ** (8 * width - 1)
    whole = np.round(expected.astype(np.float64) * full * 0.999).astype(np.int64)
    if width == 1:
        data = (whole + 128).astype(np.uint8)
    elif width == 3:
        data = whole.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3]
    else:
        data = whole.astype(dtype)
    stereo = np.repeat(data.reshape(len(expected), -1), 2, axis=0).tobytes()
    for channels, content in ((1, data.tobytes()), (2, stereo)):
        samples, rate = features.read_wav(wav(content, channels=channels, width=width))
        assert rate == 16_000
        np.testing.assert_allclose(samples, expected, atol=1.1 / full + 0.001)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a PCM WAV"),
        (b"ID3\x04 this is an mp3", "ffmpeg"),
        (HELLO.read_bytes()[:30], "not a PCM WAV"),
        (HELLO.read_bytes()[:44], "no sound"),
        (HELLO.read_bytes()[:20] + b"\x03\x00" + HELLO.read_bytes()[22:], "not a PCM WAV"),  # floats
        (HELLO.read_bytes()[:24] + bytes(4) + HELLO.read_bytes()[28:], "record at 8 kHz"),
    ],
)
def test_unreadable_audio_is_refused_with_a_way_out(content, says):
    with pytest.raises(features.UnreadableAudio, match=says):
        features.read_wav(io.BytesIO(content))


def test_a_recording_cut_off_in_the_middle_is_read_as_far_as_it_goes():
    whole, _ = features.read_wav(HELLO)
    half, _ = features.read_wav(io.BytesIO(HELLO.read_bytes()[: 44 + len(whole) // 2 * 2 + 1]))
    np.testing.assert_array_equal(half, whole[: len(half)])
    assert len(half) == len(whole) // 2


def test_an_absent_file_is_named():
    with pytest.raises(features.UnreadableAudio, match=r"absent\.wav cannot be read"):
        features.features_of(Path("absent.wav"))


# Vocabulary and voices


def test_keywords_and_other_words_do_not_overlap():
    everything = words.KEYWORDS + words.OTHER_WORDS + words.UNHEARD_WORDS
    assert len(set(everything)) == len(everything)
    assert len(words.KEYWORDS) >= 12


def test_no_speaker_is_both_trained_and_tested():
    groups = [split.speakers for split in synthesize.SPLITS.values()]
    everyone = [speaker for group in groups for speaker in group]
    assert len(set(everyone)) == len(everyone)
    assert "en-029" not in synthesize.ACCENTS


def test_the_plan_is_repeatable_distinct_and_complete():
    clips = synthesize.plan("test")
    assert clips == synthesize.plan("test")
    assert len({clip.file_name for clip in clips}) == len(clips)
    counts = np.bincount([clip.label for clip in clips])
    assert list(counts) == [40] * len(words.KEYWORDS) + [80]
    assert clips != synthesize.plan("test", seed=1)


def test_every_noise_leaves_a_finite_recording_that_holds_the_word():
    rng = np.random.default_rng(0)
    samples, rate = features.read_wav(HELLO)
    word = augment.trim(features.resample(samples, rate))
    for _ in range(40):
        recording = augment.augment(word, [word[::-1]], rng)
        assert np.isfinite(recording).all()
        assert len(word) < len(recording) <= features.LONGEST_S * features.SAMPLE_RATE_HZ


# The front end


@contextmanager
def service(reply: Callable[[bytes], tuple[int, bytes]]) -> Iterator[str]:
    """A real HTTP server on a free port that answers POST /v1/predict by `reply`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = reply(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status if self.path == "/v1/predict" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent: a test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_front_end_prints_word_probability_and_timing(session, capsys):
    def reply(body: bytes) -> tuple[int, bytes]:
        request = json.loads(body)
        assert (request["model"], request["precision"]) == ("keywords", "fp32")
        clips = np.array(request["inputs"]["features"], np.float32)
        answer = probabilities(session, clips, np.array(request["inputs"]["lengths"]))
        return 200, json.dumps(
            {
                "model": "keywords",
                "version": "3",
                "precision": "fp32",
                "outputs": {"probabilities": answer.tolist()},
                "timing": {"queue_ms": 0.4, "compute_ms": 1.1, "batch_size": 16},
            }
        ).encode()

    with service(reply) as url:
        assert frontend.main(["hello.wav", "--url", url, "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("hello  ")
    for part in ("version 3 in fp32", "queue 0.4 ms", "compute 1.1 ms", "batch of 16", "round trip"):
        assert part in printed


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (
            404,
            b'{"error": "There is no model \'keywords\'; load it.", "code": "unknown_model"}',
            "There is no model",
        ),
        (502, b"<html>bad gateway</html>", "502 without a reason"),
        (200, b"<html>hello</html>", "not JSON"),
        (200, b"[1, 2]", "another kind"),
        (200, b'{"outputs": {"probabilities": [[0.5, 0.5]]}}', "17 probabilities"),
        (200, b'{"outputs": {}}', "17 probabilities"),
    ],
)
def test_front_end_says_what_went_wrong_at_the_service(status, body, says, capsys):
    with service(lambda _: (status, body)) as url:
        assert frontend.main(["hello.wav", "--url", url]) == 1
    assert says in capsys.readouterr().err


def test_front_end_says_how_to_start_an_absent_service(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert frontend.main(["hello.wav", "--url", url]) == 1
    assert "make serve" in capsys.readouterr().err
    assert frontend.main(["hello.wav", "--url", "nonsense"]) == 1


def test_front_end_gives_up_on_a_silent_service(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert frontend.main(["hello.wav", "--url", url, "--timeout", "0.2"]) == 1
    assert "no answer in 0.2 s" in capsys.readouterr().err


def test_front_end_refuses_what_is_no_recording(tmp_path, capsys):
    text = tmp_path / "notes.wav"
    text.write_text("not sound")
    assert frontend.main([str(text)]) == 2
    assert "notes.wav is not a PCM WAV file" in capsys.readouterr().err
    assert frontend.main([str(tmp_path)]) == 2


def test_front_end_sends_one_clip_with_its_length():
    clip = features.features_of(HELLO)
    request = json.loads(frontend.request_body(clip))
    assert set(request) == {"model", "inputs"}
    assert request["inputs"]["lengths"] == [len(clip)]
    np.testing.assert_array_equal(np.array(request["inputs"]["features"], np.float32), clip[None])
