"""Sweeps: one config, many runs; a grid over axes, or a search with Optuna."""
