"""Live answers compared with FP32, and fallback."""
