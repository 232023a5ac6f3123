"""The one error of this package."""

from __future__ import annotations


class ExportFileError(Exception):
    """A file that cannot be read, converted or written; one sentence: file, fact, remedy."""
