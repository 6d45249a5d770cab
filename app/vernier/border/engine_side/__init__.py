"""The fronts as an engine process sees them."""
