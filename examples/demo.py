"""A small load on both examples that rises and falls, so that dashboards have something to show.

    python examples/demo.py --url http://127.0.0.1:8000

Compose runs it with `--profile demo`. NumPy and the standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.recommender import frontend as recommender
from examples.recommender import simulator
from examples.speech import frontend as speech
from examples.speech.features import features_of

MODELS = {recommender.MODEL, speech.MODEL}
#: A rise and a fall take so long.
PERIOD_S = 300.0
#: What a request asks for, and how often of 100: rankings of 10 to 200 items, and one recording.
ITEMS = (10, 50, 200)
SPEECH_PERCENT = 10
REPORT_S = 60.0
TIMEOUT_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 at the end of `--seconds` when any request was answered, else 1; 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second, in the mean")
    parser.add_argument("--seconds", type=float, default=math.inf, help="when to stop; never by default")
    options = parser.parse_args(arguments)
    if not 0 < options.rate <= 1000:
        parser.error(f"--rate is {options.rate:g}: give requests a second, 1000 at most")
    try:
        return run(options.url, options.rate, options.seconds)
    except KeyboardInterrupt:
        return 130


def rate_at(elapsed_s: float, mean: float) -> float:
    """Requests a second: from half of `mean` to one and a half."""
    return mean * (1 + 0.5 * math.sin(2 * math.pi * elapsed_s / PERIOD_S))


def wait_for_models(url: str) -> None:
    """Until the service has both examples; says once what it waits for."""
    said = False
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=TIMEOUT_S) as answer:
                if {model["name"] for model in json.load(answer)["models"]} >= MODELS:
                    return
        except (OSError, ValueError):
            pass
        if not said:
            print(f"Waiting until {url} serves {' and '.join(sorted(MODELS))}.", flush=True)
            said = True
        time.sleep(1)


def run(url: str, mean: float, seconds: float) -> int:
    wait_for_models(url)
    chance = random.Random(0)
    recording = speech.request_body(features_of(speech.locate("hello.wav")))
    started = reported = time.monotonic()
    answered = failed = total = 0
    while (now := time.monotonic()) - started < seconds:
        try:
            if chance.randrange(100) < SPEECH_PERCENT:
                speech.ask(url, recording, TIMEOUT_S)
            else:
                user = chance.randint(1, simulator.FIELDS["user"])
                shown = simulator.candidates(user, chance.choice(ITEMS))
                recommender.ask(url, recommender.request_body(shown), TIMEOUT_S)
            answered += 1
            total += 1
        except (recommender.Unanswered, speech.NoAnswer) as failure:
            if not failed:
                print(f"{failure} Trying again.", flush=True)
            failed += 1
            time.sleep(1)
        if now - reported >= REPORT_S:
            print(f"{answered} answered, {failed} failed in the last {now - reported:.0f} s", flush=True)
            answered, failed, reported = 0, 0, now
        pause = chance.expovariate(rate_at(now - started, mean)) - (time.monotonic() - now)
        time.sleep(max(0.0, pause))
    print(f"{total} requests were answered", flush=True)
    return 0 if total else 1


if __name__ == "__main__":
    sys.exit(main())
