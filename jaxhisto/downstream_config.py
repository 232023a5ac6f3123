"""Settings of the verbs that say what an encoder is worth, as `config.py` has those of training."""

from __future__ import annotations
