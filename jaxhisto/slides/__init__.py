"""Slides to tiles: reading, foreground, tiling, report. Imports no jax."""
