"""The engine processes as a front sees them."""
