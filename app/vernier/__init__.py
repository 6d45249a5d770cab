"""Vernier: serves ONNX models at the lowest precision that keeps their accuracy."""

import os

__version__ = "0.1.0"

# ONNX Runtime's packages send usage data to their maker unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
