"""The eight sets of the paper's App. C.1, in the form in which they are published."""

from __future__ import annotations

from collections.abc import Callable

from jaxhisto.data.tasks import Task
from jaxhisto.downstream_config import TaskConfig

READERS: dict[str, Callable[[TaskConfig], Task]] = {}
"""The reader of each layout."""
