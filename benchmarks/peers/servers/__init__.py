"""The peers' side: one script a framework, run by the Python of that framework's environment.

    python benchmarks/peers/servers/<name>.py PORT MODEL WORKLOAD

`MODEL` is an ONNX file with input `x` and output `y`. `WORKLOAD` is `json`, `binary` (the same network, raw
float32) or `large` (a 3×224×224 image in raw float32, of which the last two numbers are the answer; no network).
`PEER_WORKERS` in the environment is the number of processes, where the framework can have several. Nothing here imports
anything of Vernier. Settings follow each framework's documentation on batching.
"""
