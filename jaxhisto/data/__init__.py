"""Tile stores and image folders, and the batches made of them. Imports no jax."""
