"""Variants to TensorRT plans."""
