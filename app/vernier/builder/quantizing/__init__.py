"""Scales of activations and INT8 weights, from data."""
