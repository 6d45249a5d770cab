"""Vernier beside its peers: the same model, one run, one core for the server and one for the load.

    python -m benchmarks.peers            # everything; or --part json, binary, large, decode
    python -m benchmarks.peers --cores 8  # several cores instead: see benchmarks.scaling

Each peer lives in an environment of its own under build/peers/. A peer that cannot be installed or started, or that
answers wrongly, is reported with the reason, and the rest goes on.
"""
