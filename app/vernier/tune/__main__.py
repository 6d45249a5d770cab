"""`python -m vernier.tune engines/ranker/3 --objective-ms 20`: finds the settings that sustain most under one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vernier.builder import command
from vernier.builder.progress import NoProgress, for_people
from vernier.builder.reports import table as printing
from vernier.errors import BuildError
from vernier.package.integrity import list_versions
from vernier.package.manifest import read_manifest
from vernier.settings import DEFAULT_CONFIG, config_file, load_settings
from vernier.tune import config, table
from vernier.tune.requests import make_requests
from vernier.tune.search import Tuning, Wish, tune

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.command()
def run(
    package: Annotated[Path, typer.Argument(help="Such as engines/ranker/3.", show_default=False)],
    objective_ms: Annotated[
        float, typer.Option(min=0.01, help="The latency that 99 % of the requests must stay under.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Requests to send: an .npz, a folder of .npy, or module:function; else golden vectors."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each request.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.05, help="How long each load lasts.")] = 1.5,
    slots: Annotated[str | None, typer.Option(help="Numbers of slots to try, such as 1,2.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed sends the same requests.")] = 0,
    write: Annotated[
        Path | None,
        typer.Option(
            help="The settings file (TOML) to write to; by default the one in force.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Tries PACKAGE's settings under load on this machine and writes the best ones where the service reads them."""
    settings = load_settings()
    package = _version(package)
    name = read_manifest(package).name
    target = write or config_file() or DEFAULT_CONFIG
    if not dry_run:
        config.read(target)  # what cannot be written to should be said before, not after
    manifest = read_manifest(package)
    requests = make_requests(package, manifest, data, rows)
    wish = Wish(package, objective_ms, rows, seconds, seed, _numbers(slots))
    tuning = _run_as_the_service(tune(wish, requests, settings, NoProgress() if as_json else for_people()))
    if tuning.chosen is None:
        if as_json:
            command.print_json({**table.as_json(tuning), "error": table.refusal(tuning)})
        else:
            sys.stderr.write(f"vernier.tune: {table.refusal(tuning)}\n")
        raise typer.Exit(1)
    chosen = {**tuning.chosen.candidate.as_json(), "latency_objective_ms": objective_ms}
    if not dry_run:
        document = config.read(target)
        config.set_model(document, name, chosen)
        config.write(target, document)
    if as_json:
        command.print_json({**table.as_json(tuning), "written": None if dry_run else str(target)})
        return
    console = printing.console()
    console.print(table.render(tuning))
    if dry_run:
        console.print(config.section_text(name, chosen), markup=False)
    else:
        console.print(
            f"{target} has them now under models.{name}; restart the service to use them", markup=False
        )
    for variable in config.shadowing(name, chosen):
        console.print(f"{variable} is set here and wins over the file: take it out", markup=False)


def _version(package: Path) -> Path:
    """The package itself, or the newest version of the model whose folder was named."""
    versions = list_versions(package) if package.is_dir() else []
    return package / str(versions[-1]) if versions else package


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 256 for part in parts):
        raise BuildError(f"--slots takes numbers from 1 to 256 such as 1,2, not '{text}'")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _run_as_the_service(work: Coroutine[Any, Any, Tuning]) -> Tuning:
    """On the event loop that the service would run on."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes.

    Returns:
        0 done, 1 no settings meet the objective, 2 bad input (said in one sentence on standard error, or as
        `{"error": …}` on standard output with `--json`), 3 a fault in Vernier, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return command.run(app, given, "python -m vernier.tune")


if __name__ == "__main__":
    sys.exit(main())
