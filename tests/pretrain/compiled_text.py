"""What devices exchange, read from a compiled program's text."""

from __future__ import annotations

import re

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def collectives(text: str) -> list[tuple[str, int, bool]]:
    """(operation, bytes, inside a loop) of every exchange in a compiled program."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        name = head.group(1) if head else name
        bodies.setdefault(name, []).append(line)
    called = {
        name: set(re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", "\n".join(lines)))
        for name, lines in bodies.items()
    }
    inside = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    while more := {c for name in inside for c in called.get(name, ())} - inside:
        inside |= more
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
            if match:
                shapes = re.findall(r"\b[fsu]32\[([\d,]*)\]", match.group(1))
                size = sum(4 * int(np.prod([int(d) for d in s.split(",") if d])) for s in shapes)
                found.append((match.group(2), size, name in inside))
    return found
