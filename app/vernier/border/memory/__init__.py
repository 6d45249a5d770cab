"""Memory that processes share, and where arrays lie in it."""
