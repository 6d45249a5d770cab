"""Vernier: serves ONNX models at the lowest precision that keeps their accuracy."""

__version__ = "0.1.0"
