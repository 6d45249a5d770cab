#!/usr/bin/env python3
"""Builds an engine package from an ONNX model: `python build_engine.py model.onnx --name ranker`."""

import sys

from app.build.cli import main

if __name__ == "__main__":
    sys.exit(main())
