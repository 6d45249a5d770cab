"""`python -m benchmarks.peers`: see the package. With --cores, the benchmark of benchmarks.scaling.

This module needs nothing but Python itself: with --wheels what the others import is installed first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.peers import carry


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--cores", type=int)
    chosen, _ = parser.parse_known_args()
    if chosen.wheels is not None and carry.CARRIED not in os.environ:
        carry.restart(chosen.wheels.resolve(), sys.argv[1:])
    if chosen.cores is not None or "--merge" in sys.argv:
        from benchmarks.scaling.command import main as run
    else:
        from benchmarks.peers.command import main as run
    run()


if __name__ == "__main__":
    main()
