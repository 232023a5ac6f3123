"""jaxhisto: slides to tiles, tiles to SimCLR encoders, encoders to PyTorch files."""

__version__ = "0.1.0"
