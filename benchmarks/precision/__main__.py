"""`python -m benchmarks.precision`: builds every exhibit at 99 % and at 99.9 %, and writes benchmarks/PRECISION.md.

Each build is a process of its own, so that its peak memory is its own. Results lie in a folder that
is not committed; `--only NAME` measures one exhibit anew and `--write` only renders the page. Training
the four small models takes about five minutes on two cores and happens once. Needs torch (`pip
install -e .[train]`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.precision import page, resnet50
from benchmarks.precision.exhibit import Exhibit
from benchmarks.precision.measure import as_json, measure
from benchmarks.precision.memory import measure_memory, remember
from benchmarks.precision.traps import measure_traps, traps_json

RESULTS = Path(__file__).resolve().parents[1] / "results" / "precision"
EXHIBITS = RESULTS / "exhibits"
PAGE = Path(__file__).resolve().parents[1] / "PRECISION.md"
TRAINED = ("residual", "separable", "transformer", "lstm")
NAMES = (*TRAINED, "recommender", "speech", "resnet50", "traps")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--only", choices=NAMES, action="append", help="measure these alone")
    parser.add_argument("--write", action="store_true", help="render the page from the results at hand")
    parser.add_argument("--memory", type=int, nargs="+", help="peak memory with so many calibration samples")
    parser.add_argument("--make", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    EXHIBITS.mkdir(parents=True, exist_ok=True)
    if options.memory:
        for samples in options.memory:
            peak = measure_memory(samples)
            print(peak.sentence, flush=True)
            remember(peak, RESULTS / page.MEMORY)
    elif options.make:
        make(options.make).remember(EXHIBITS)
    elif options.one:
        measure_one(options.one[0], options.one[1] == "strict")
    else:
        for name in () if options.write else options.only or NAMES:
            measure_all(name)
        PAGE.write_text(page.render(RESULTS), "utf-8")


def measure_all(name: str) -> None:
    """Every measurement of one exhibit, each in a process of its own."""
    if name != "traps":
        _run("--make", name)
    for how in ("ordinary",) if name in ("resnet50", "traps") else ("ordinary", "strict"):
        print(f"{name}, {how}", file=sys.stderr, flush=True)
        _run("--one", name, how)


def _run(*arguments: str) -> None:
    command = [sys.executable, "-m", "benchmarks.precision", *arguments]
    subprocess.run(command, check=True, cwd=RESULTS.parents[2])


def make(name: str) -> Exhibit:
    """Trains the model or draws the data, unless that was done before."""
    # torch is only needed to train, takes its time to import, and would count as the build's memory.
    if name in ("recommender", "speech"):
        from benchmarks.precision import shipped

        return shipped.recommender(EXHIBITS) if name == "recommender" else shipped.speech(EXHIBITS)
    if name == "resnet50":
        return resnet50.make(EXHIBITS)
    from benchmarks.precision import zoo

    return zoo.make(name, EXHIBITS)


def measure_one(name: str, strict: bool) -> None:
    """Measures in this process and leaves a JSON file in the results folder."""
    if name == "traps":
        (RESULTS / "traps.json").write_text(traps_json(measure_traps()), "utf-8")
        return
    exhibit = Exhibit.recall(name, EXHIBITS)
    if name == "resnet50":
        row = measure(exhibit, strict, ("fp32", "fp16", "int8"), plans=False)
    else:
        row = measure(exhibit, strict)
    (RESULTS / f"{name}-{'strict' if strict else 'ordinary'}.json").write_text(as_json(row), "utf-8")


if __name__ == "__main__":
    main()
