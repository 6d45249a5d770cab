"""Which nodes may have low precision: trials, gate, search."""
