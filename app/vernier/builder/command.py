"""What a command line of ours has around typer: exit codes, and errors as one sentence or as JSON."""

from __future__ import annotations

import json
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from vernier import __version__
from vernier.errors import BuildError, BuildInterrupted, EngineError, VernierError

DONE, REFUSED, BAD_INPUT, FAULT, INTERRUPTED = 0, 1, 2, 3, 130
_TOOLS = ("onnx", "onnxruntime", "numpy")
_REPORT = "; please report it with the versions and the traceback"
#: The base of click's own errors, wherever this release of typer keeps them: BadParameter, UsageError, ClickException.
_ClickError: Any = typer.BadParameter.__mro__[2]


def print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def tool_versions() -> dict[str, str]:
    """What a package is made with, and what a report of a fault needs."""
    found = {"vernier": __version__, "python": platform.python_version()}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


def fault_report(trace: str) -> dict[str, Any]:
    """What to report about a fault of ours: versions, platform and traceback."""
    return {"versions": tool_versions(), "platform": platform.platform(), "traceback": trace}


def fault_text(trace: str) -> str:
    """`fault_report` for people."""
    versions = ", ".join(f"{name} {number}" for name, number in tool_versions().items())
    return f"{versions}, {platform.platform()}\n{trace.rstrip()}\n"


def run(app: typer.Typer, arguments: Sequence[str], name: str) -> int:
    """Runs a command and returns its exit code.

    An error is one sentence on standard error after the command's `name`, or `{"error": …}` on standard output
    with `--json`. Bad input ends with 2 or the error's own code, interruption with 130. Whatever should not
    have happened ends with 3, and what to report about it (versions and traceback) stands below the sentence, or
    in `fault`.
    """
    as_json = "--json" in arguments
    called = name.removeprefix("python -m ")

    def end(code: int, message: str, trace: str = "") -> int:
        if as_json:
            print_json({"error": message} | ({"fault": fault_report(trace)} if trace else {}))
        else:
            sys.stderr.write(f"{called}: {message}\n" + (fault_text(trace) if trace else ""))
        return code

    try:
        code = app(list(arguments), prog_name=name, standalone_mode=False)
        if code == INTERRUPTED:  # typer's own, of a KeyboardInterrupt that nothing else has caught
            return end(INTERRUPTED, "interrupted; nothing was written")
        return code if isinstance(code, int) else DONE
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return end(INTERRUPTED, "interrupted; nothing was written")
    except BuildInterrupted as error:
        return end(INTERRUPTED, error.message)
    except EngineError as error:
        return end(FAULT, f"{error.message}{_REPORT}", traceback.format_exc())
    except VernierError as error:
        return end(error.exit_code if isinstance(error, BuildError) else BAD_INPUT, error.message)
    except _ClickError as error:
        if as_json:
            return end(BAD_INPUT, error.format_message())
        error.show()
        return BAD_INPUT
    except Exception as error:
        found = f"{type(error).__name__}: {error}".rstrip(": ")
        return end(FAULT, _please_report(found), traceback.format_exc())


def _please_report(found: str) -> str:
    return (
        f"a fault in Vernier, not in the input: {found}; please report it with the versions and the traceback"
    )
