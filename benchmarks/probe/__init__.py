"""Measurements of single kernels and of whole steps, for the first minutes on a GPU."""
