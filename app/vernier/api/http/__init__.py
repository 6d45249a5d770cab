"""One HTTP request: its head, its body, its id, its answer."""
