"""Measurements of the kernels, as ratios in one interleaved run."""
