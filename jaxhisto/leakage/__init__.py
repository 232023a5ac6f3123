"""Does what was pretrained on overlap with an evaluation set? No JAX in here."""
