"""What a command line of ours has around typer: exit codes, and errors as one sentence or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer

from vernier.errors import BuildError, VernierError


def print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def run(app: typer.Typer, arguments: Sequence[str], name: str) -> int:
    """Runs a command and returns its exit code.

    An error of ours is one sentence on standard error after the command's `name`, or `{"error": …}` on
    standard output with `--json`, and its own exit code or 2. Interrupted: 130.
    """
    try:
        app(list(arguments), prog_name=name)
    except SystemExit as done:  # typer has shown its usage errors by now
        return done.code if isinstance(done.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except VernierError as error:
        if "--json" in arguments:
            print_json({"error": error.message})
        else:
            sys.stderr.write(f"{name.removeprefix('python -m ')}: {error.message}\n")
        return error.exit_code if isinstance(error, BuildError) else 2
    return 0
