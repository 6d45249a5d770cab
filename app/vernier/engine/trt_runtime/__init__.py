"""TensorRT, TensorRT-RTX and the lean runtime."""
