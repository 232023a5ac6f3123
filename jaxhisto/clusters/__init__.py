"""What is in a set of tiles: clusters, neighbours, sheets."""
