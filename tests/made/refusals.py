"""What a refused line said."""

from __future__ import annotations


def refusal(result: tuple[int, str, str], code: int = 1) -> str:
    """The one sentence of a line's (exit code, stdout, stderr)."""
    assert result[0] == code, result
    lines = [line for line in result[2].splitlines() if line.startswith("jaxhisto ")]
    assert len(lines) == 1, result[2]
    return lines[0]
