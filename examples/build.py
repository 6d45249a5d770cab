"""Builds the example packages that an engines folder does not have: `python examples/build.py --out engines`.

Compose runs it beside the service with `--first`: then nothing is built where a package lies already, nor where
VERNIER_EXAMPLES is not 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
#: Model → folder of the example.
EXAMPLES = {"ranker": "recommender", "keywords": "speech"}
#: Lies beside this folder in a checkout, and in the working directory of the builder's image.
BUILDER = "build_engine.py"


def main(arguments: list[str] | None = None) -> int:
    """Exit code: that of the builder when it fails, else 0; 2 for a wrong command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"some of {', '.join(EXAMPLES)}; all when none is named")
    parser.add_argument("--out", type=Path, default=Path("engines"), help="the engines folder")
    parser.add_argument(
        "--first", action="store_true", help="only into an empty folder, with VERNIER_EXAMPLES=1"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(EXAMPLES):
        parser.error(f"there is no example {', '.join(sorted(unknown))}: choose from {', '.join(EXAMPLES)}")
    if options.first:
        if os.environ.get("VERNIER_EXAMPLES") != "1":
            print("No examples are built: VERNIER_EXAMPLES is not 1.")
            return 0
        if found := next(options.out.glob("[!.]*/*/manifest.json"), None):
            print(f"No examples are built: {options.out} has packages, {found.parent} among them.")
            return 0
    for model in options.models or EXAMPLES:
        if (options.out / model / "1" / "manifest.json").exists():
            print(f"{options.out / model / '1'} is there already.")
        elif code := build(model, options.out):
            return code
    return 0


def build(model: str, out: Path) -> int:
    """The builder's exit code."""
    data = FOLDER / EXAMPLES[model]
    builder = FOLDER.parent / BUILDER
    command = [sys.executable, str(builder if builder.exists() else BUILDER), str(data / "model.onnx")]
    command += ["--name", model, "--precision", "fp32,fp16,int8", "--out", str(out)]
    command += ["--calibration", str(data / "calibration.npz"), "--eval", str(data / "eval.npz")]
    print(f"Building {model} …", flush=True)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
