"""Quantization: the grid (the one definition of rounding), the scale search and the solvers."""
