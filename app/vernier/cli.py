"""The command `vernier`: serves models, builds and looks at packages, tunes, makes keys, and asks a running service."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vernier.errors import VernierError
from vernier.settings import KEY_VARIABLE, URL_VARIABLE

DEFAULT_URL = "http://127.0.0.1:8000"

HELP = """usage: vernier COMMAND [OPTION …]

  serve                          serve the packages of VERNIER_ENGINES_DIR (docs/settings.md); so does `vernier` alone
  build MODEL.onnx --name NAME   make an engine package with a proof of its accuracy
  inspect PACKAGE                show what a package holds and what was proven about it
  compare A B                    how far two models or packages are from each other
  tune PACKAGE --objective-ms T  find slots, batch sizes and delay under load
  keys NAME                      make a key for a client
  models                         what a running service serves
  predict MODEL INPUTS           ask a running service; INPUTS is JSON, or @FILE with JSON or an .npz

`vernier COMMAND --help` tells the options. build, inspect, compare and tune need `pip install 'vernier[build]'`.
"""


class CommandError(VernierError):
    """What was asked for cannot be done; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 bad input, others as the command says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (given[0], given[1:]) if given else ("serve", [])
    if name in ("--help", "-h", "help"):
        sys.stdout.write(HELP)
        return 0
    run = COMMANDS.get(name)
    if run is None:
        sys.stderr.write(f"vernier: there is no command '{name}'; there are {', '.join(COMMANDS)}\n")
        return 2
    try:
        return run(name, rest)
    except CommandError as error:
        sys.stderr.write(f"vernier: {error.message}\n")
        return 2


def _serve(name: str, arguments: list[str]) -> int:
    text = "Serves the packages of VERNIER_ENGINES_DIR. Settings are variables VERNIER_…, or stand in vernier.toml."
    argparse.ArgumentParser("vernier serve", description=text).parse_args(arguments)
    from vernier.__main__ import main as serve

    serve()
    return 0


def _builder(name: str, arguments: list[str]) -> int:
    try:
        from vernier.builder.cli import main as build
    except ModuleNotFoundError as error:
        raise _without_builder(name, error) from error
    return build([name, *arguments], "vernier")


def _tune(name: str, arguments: list[str]) -> int:
    try:
        from vernier.tune.__main__ import main as tune
    except ModuleNotFoundError as error:
        raise _without_builder(name, error) from error
    return tune(arguments)


def _without_builder(name: str, error: ModuleNotFoundError) -> CommandError:
    return CommandError(f"{name} needs the package {error.name}: pip install 'vernier[build]'")


def _keys(name: str, arguments: list[str]) -> int:
    from vernier.keys import main as make_key

    make_key(arguments)
    return 0


# --- asking a running service ---------------------------------------------------------------------
def _client(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"vernier {name}", description=description)
    default = os.environ.get(URL_VARIABLE, DEFAULT_URL)
    parser.add_argument(
        "--url", default=default, help=f"of the service; else {URL_VARIABLE}, else {DEFAULT_URL}"
    )
    parser.add_argument("--key", help="where the service has keys; else " + KEY_VARIABLE)
    return parser


def _models(name: str, arguments: list[str]) -> int:
    options = _client(name, "Lists what a running service serves.").parse_args(arguments)
    for model in _ask(options, "/v1/models")["models"]:
        sys.stdout.write("{name}\t{version}\t{precision}\t{runtime}\t{state}\n".format(**model))
    return 0


def _predict(name: str, arguments: list[str]) -> int:
    parser = _client(name, "Asks a running service for a prediction and prints its answer as JSON.")
    parser.add_argument("model")
    parser.add_argument("inputs", help="such as '{\"x\": [[1, 2]]}', or @FILE with JSON or an .npz")
    parser.add_argument("--version", help="of the model; the newest by default")
    parser.add_argument("--precision", help="the variant that shall answer; the active one by default")
    options = parser.parse_args(arguments)
    fields = {"version": options.version, "precision": options.precision}
    request = {"model": options.model, "inputs": _inputs(options.inputs)}
    request |= {field: value for field, value in fields.items() if value is not None}
    sys.stdout.write(json.dumps(_ask(options, "/v1/predict", request)) + "\n")
    return 0


def _inputs(text: str) -> Any:
    """JSON, or what the file behind an @ holds. Raises CommandError."""
    try:
        if text.startswith("@") and text.endswith(".npz"):
            import numpy as np

            with np.load(text[1:], allow_pickle=False) as arrays:
                return {name: arrays[name].tolist() for name in arrays.files}
        return json.loads(Path(text[1:]).read_text("utf-8") if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise CommandError(f"the inputs cannot be read: {error}") from error


def _ask(options: argparse.Namespace, path: str, body: object = None) -> Any:
    """The answer of the service. Raises CommandError with the sentence that it answers."""
    headers = {"content-type": "application/json"}
    key = options.key or os.environ.get(KEY_VARIABLE)
    if key:
        headers["authorization"] = f"Bearer {key}"
    if not options.url.startswith(("http://", "https://")):
        raise CommandError(f"--url must begin with http:// or https://, not '{options.url}'")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(options.url.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        with suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]
        raise CommandError(f"{error.code}: {text}") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"{options.url} does not answer as a service of Vernier: {error}") from error


COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
    "serve": _serve,
    "build": _builder,
    "inspect": _builder,
    "compare": _builder,
    "tune": _tune,
    "keys": _keys,
    "models": _models,
    "predict": _predict,
}

if __name__ == "__main__":
    sys.exit(main())
