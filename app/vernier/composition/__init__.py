"""Composition: which part is made from which, for each kind of process."""
