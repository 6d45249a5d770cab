#!/usr/bin/env python3
"""Builds an engine package from an ONNX model: `python build_engine.py model.onnx --name ranker`."""

import sys
from pathlib import Path

# From a checkout it works without being installed; where the folder does not exist, the installed package is meant.
sys.path.insert(0, str(Path(__file__).resolve().parent / "app"))

from vernier.builder.cli import main

if __name__ == "__main__":
    sys.exit(main())
