"""Scores of generated text that rise without a gradient: the grid of runs, tables and plots."""
