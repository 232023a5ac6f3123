"""Measuring training, stage by stage, beside its peers: `jaxhisto bench`."""
