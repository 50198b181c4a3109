"""Sweeps: trials of a recipe on Ray Tune."""
