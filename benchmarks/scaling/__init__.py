"""Vernier on one core and on several, beside what it was before, MOSEC and FastAPI.

    python -m benchmarks.peers --cores 8               # every number of cores: 1, 2, 4, 8; needs a core or more besides
    python -m benchmarks.peers --cores 8 --minutes 9   # as many rounds as fit, however few
    python -m benchmarks.peers --merge a.json b.json   # into SCALING.json, and the page again

A server gets the first cores of the machine; the load gets those that no server of the run uses. Servers are started
anew for each measurement, in turns, and every ratio is one of a single round.
"""
