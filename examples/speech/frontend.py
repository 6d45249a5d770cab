"""Asks the service which word a WAV file says.

    python examples/speech/frontend.py hello.wav

NumPy and the standard library only: all that a client of `POST /v1/predict` has to do is here.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.speech.features import HOP, SAMPLE_RATE_HZ, Floats, UnreadableAudio, features_of

MODEL = "keywords"
FOLDER = Path(__file__).resolve().parent


class NoAnswer(RuntimeError):
    """The service gave no probabilities; the message is what the user is told."""


@dataclass(frozen=True)
class Guess:
    """A word and how sure the model is of it, 0 to 1."""

    word: str
    probability: float


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 after a word was printed, 1 when the service gave none, 2 for a WAV that can't be read."""
    parser = argparse.ArgumentParser(description="Say which keyword a WAV file holds.")
    parser.add_argument(
        "wav", nargs="?", default="hello.wav", help="a PCM WAV file (default: the hello.wav beside this)"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens")
    parser.add_argument(
        "--precision", help="ask for one variant (fp32, fp16, int8, …) instead of the service's choice"
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=10.0, metavar="SECONDS", help="wait no longer for the answer"
    )
    options = parser.parse_args(arguments)
    try:
        features = features_of(locate(options.wav))
    except UnreadableAudio as error:
        print(error, file=sys.stderr)
        return 2
    body = request_body(features, options.precision)
    started = time.perf_counter()
    try:
        answer = ask(options.url, body, options.timeout)
        guesses = ranked(answer, load_labels())
    except NoAnswer as error:
        print(error, file=sys.stderr)
        return 1
    print(report(guesses, answer, len(features), 1e3 * (time.perf_counter() - started)))
    return 0


def locate(name: str) -> Path:
    """The file as named, or the one of that name that comes with this example."""
    path, bundled = Path(name), FOLDER / name
    return bundled if not path.exists() and bundled.is_file() else path


def load_labels() -> list[str]:
    """The words in the order of the model's classes."""
    return (FOLDER / "labels.txt").read_text(encoding="utf-8").split()


def request_body(features: Floats, precision: str | None = None) -> bytes:
    """The JSON request for features [frames, 40]."""
    inputs = {"features": [features.tolist()], "lengths": [len(features)]}
    request: dict[str, Any] = {"model": MODEL, "inputs": inputs}
    if precision is not None:
        request["precision"] = precision
    return json.dumps(request, separators=(",", ":")).encode()


def ask(url: str, body: bytes, timeout_s: float) -> dict[str, Any]:
    """Send a prediction request and return the decoded answer; raises NoAnswer with a sentence."""
    try:
        request = urllib.request.Request(
            url.rstrip("/") + "/v1/predict", data=body, headers={"Content-Type": "application/json"}
        )
        with _opener(url).open(request, timeout=timeout_s) as response:
            status, data = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            raise NoAnswer(explain(error.code, error.read())) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise NoAnswer(
                f"The service at {url} gave no answer in {timeout_s:g} s; is it overloaded?"
            ) from error
        raise NoAnswer(
            f"No service answers at {url} ({reason or type(error).__name__}); start it with `make serve`, "
            "or say where it is with --url."
        ) from error
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise NoAnswer(f"{url} answered {status} with something that is not JSON; is --url right?") from error
    if not isinstance(answer, dict):
        raise NoAnswer(f"{url} answered {status} with JSON of another kind than expected; is --url right?")
    return answer


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Without the environment's proxy for this very machine, which no proxy could reach."""
    near = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if near else []))


def explain(status: int, data: bytes) -> str:
    """What to tell the user about an error answer."""
    try:
        fault = json.loads(data)
        return f"The service refused ({status} {fault['code']}): {fault['error']}"
    except (ValueError, KeyError, TypeError):
        return f"The service answered {status} without a reason; its log has more."


def ranked(answer: dict[str, Any], labels: list[str]) -> list[Guess]:
    """The words of the answer, likeliest first; raises NoAnswer when it is not an answer for these labels."""
    try:
        (probabilities,) = answer["outputs"]["probabilities"]
        guesses = [Guess(word, float(p)) for word, p in zip(labels, probabilities, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise NoAnswer(
            f"The answer does not hold {len(labels)} probabilities; is the model '{MODEL}' built from this example?"
        ) from error
    return sorted(guesses, key=lambda guess: -guess.probability)


def report(guesses: list[Guess], answer: dict[str, Any], frames: int, round_trip_ms: float) -> str:
    """What is printed: the word, the runners-up, and where the time went."""
    best, *others = guesses
    timing = answer.get("timing") or {}
    return "\n".join(
        [
            f"{best.word}  {best.probability:.1%}",
            "then  " + ", ".join(f"{guess.word} {guess.probability:.1%}" for guess in others[:3]),
            f"{frames * HOP / SAMPLE_RATE_HZ:.2f} s of sound, answered by {answer.get('model', MODEL)} "
            f"version {answer.get('version', '?')} in {answer.get('precision', '?')}",
            f"round trip {round_trip_ms:.1f} ms, of it queue {_ms(timing.get('queue_ms'))}, compute "
            f"{_ms(timing.get('compute_ms'))}, in a batch of {timing.get('batch_size', '?')}",
        ]
    )


def _ms(value: object) -> str:
    return f"{value:.1f} ms" if isinstance(value, int | float) else "not told"


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
