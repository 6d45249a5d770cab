"""Calibration and evaluation data, and what it can prove."""
