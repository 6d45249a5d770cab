"""Records between processes: sockets, formats, long messages."""
