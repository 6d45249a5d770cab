"""ONNX graphs: reading, writing, raising, simplifying, and what their axes mean."""
