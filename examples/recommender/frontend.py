"""Asks the service which of 500 items one user should see, and prints the best ten.

    python examples/recommender/frontend.py --user 42

NumPy and the standard library only: what any client of `POST /v1/predict` has to do is all here.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.recommender import simulator

MODEL = "ranker"
SHOWN = 10


class Unanswered(Exception):
    """The service gave no scores; the message is a sentence for the person at the keyboard."""


@dataclass(frozen=True)
class Ranked:
    """One line of the list: place from 1, item id, category, score and the planted probability."""

    place: int
    item: int
    category: str
    score: float
    planted: float


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 after a printed list, 1 when the service gave none, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(description="Rank items for one user of the simulated shop.")
    parser.add_argument("--user", type=int, default=42, help=f"1 to {simulator.FIELDS['user']}")
    parser.add_argument("--candidates", type=int, default=500, help="how many items to rank")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens")
    parser.add_argument("--precision", help="fp32, fp16, int8, …; left out, the service chooses")
    parser.add_argument("--timeout", type=float, default=10, help="seconds to wait for the answer")
    options = parser.parse_args(arguments)
    try:
        shown = simulator.candidates(options.user, options.candidates)
    except ValueError as error:
        parser.error(str(error))
    if not options.timeout > 0:
        parser.error(f"--timeout is {options.timeout:g}: give a number of seconds above 0")
    body = request_body(shown, options.precision)
    started = time.perf_counter()
    try:
        answer = ask(options.url, body, options.timeout)
        scores = scores_of(answer, len(shown.ids))
    except Unanswered as failure:
        print(failure, file=sys.stderr)
        return 1
    round_trip_ms = 1000 * (time.perf_counter() - started)
    print(listing(options.user, best(shown, scores), answer, len(scores), round_trip_ms))
    return 0


def request_body(shown: simulator.Impressions, precision: str | None = None) -> bytes:
    """The JSON of one prediction request for all items."""
    # Features carry three decimals; as float64 they print short and still reach the service exactly.
    dense = shown.dense.astype(np.float64).round(3)
    request: dict[str, Any] = {
        "model": MODEL,
        "inputs": {"dense": dense.tolist(), "ids": shown.ids.tolist()},
        "outputs": ["score"],
    }
    if precision:
        request["precision"] = precision
    return json.dumps(request, separators=(",", ":")).encode()


def ask(url: str, body: bytes, timeout_s: float) -> Any:
    """Sends `body` to the service at `url` and returns its JSON answer.

    Raises:
        Unanswered: nobody listens there, no answer came in time, or the answer was an error.
    """
    try:
        status, reply = _post(url.rstrip("/") + "/v1/predict", body, timeout_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise Unanswered(f"The service at {url} did not answer within {timeout_s:g} s.") from None
        raise Unanswered(
            f"No service answers at {url} ({str(reason) or type(reason).__name__}): "
            f"start it with `make serve` or name another --url."
        ) from None
    if status != http.client.OK:
        raise Unanswered(refusal(status, reply))
    try:
        return json.loads(reply)
    except ValueError:
        raise Unanswered(f"What listens at {url} did not answer in JSON: is it Vernier?") from None


def _post(url: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the answer, an error's as well."""
    handlers = []
    if urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's loopback
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def refusal(status: int, body: bytes) -> str:
    """One sentence from an error answer, whether or not it is one of the service's own."""
    try:
        answer = json.loads(body)
        return f"The service refused the request with {status} {answer['code']}: {answer['error']}"
    except (ValueError, KeyError, TypeError):
        return f"The service answered {status} without saying why: its log should."


def scores_of(answer: Any, count: int) -> simulator.Array:
    """The scores [count] of an answer.

    Raises:
        Unanswered: the answer has no such output or another number of scores.
    """
    try:
        scores = np.asarray(answer["outputs"]["score"], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise Unanswered("The answer holds no output 'score': is the model there this ranker?") from None
    if scores.shape != (count, 1):
        raise Unanswered(f"Asked for {count} scores, the answer has the shape {list(scores.shape)}.")
    return scores[:, 0]


def best(shown: simulator.Impressions, scores: simulator.Array, count: int = SHOWN) -> list[Ranked]:
    """The `count` items of the highest score, best first; equal scores keep their order."""
    order = np.argsort(-scores, kind="stable")[:count]
    _, item, category = shown.ids[order, :3].T
    return [
        Ranked(
            place + 1,
            int(item[place]),
            simulator.CATEGORIES[int(category[place]) - 1],
            float(scores[index]),
            float(shown.planted[index]),
        )
        for place, index in enumerate(order)
    ]


def listing(user: int, top: list[Ranked], answer: Any, count: int, round_trip_ms: float) -> str:
    """What is printed: the list, which engine made it and how long that took."""
    timing = answer.get("timing") or {}
    lines = [
        f"Top {len(top)} of {count} items for user {user}",
        "",
        f"{'#':>3}  {'item':>5}  {'category':<10}  {'score':>6}  {'planted':>7}",
    ]
    lines += [f"{r.place:>3}  {r.item:>5}  {r.category:<10}  {r.score:6.4f}  {r.planted:7.4f}" for r in top]
    lines += [
        "",
        f"{answer.get('model', MODEL)} version {answer.get('version', '?')}, {answer.get('precision', '?')}",
        f"round trip {round_trip_ms:.1f} ms, of which queue {_ms(timing, 'queue_ms')}, "
        f"compute {_ms(timing, 'compute_ms')} in a batch of {timing.get('batch_size', '?')}",
    ]
    return "\n".join(lines)


def _ms(timing: dict[str, Any], name: str) -> str:
    value = timing.get(name)
    return "unknown" if value is None else f"{value:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
