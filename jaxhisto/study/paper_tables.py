"""The numbers of the paper's tables, as printed, to stand beside one's own."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

TABLES = ("D.7", "D.8", "D.9", "D.10", "D.11", "C.6", "E.12", "5")
"""Those with a column a set; of some the paper prints the averages again, see `SHORT`."""
FROZEN_TABLE = "D.8"
"""Of these, that of frozen encoders; in the others all layers are trained."""
SHORT = {"D.7": "1", "D.8": "2", "D.10": "3", "D.9": "4"}
AVERAGES = {
    "classification": "Average",
    "regression": "Bpq",
    "segmentation": "Segmentation average",
}
SETS = {
    "classification": {"BACH", "NCT", "BreakHis", "Lymph", "Gleason2019"},
    "regression": {"Bpq"},
    "segmentation": {"BACH segmentation", "Dp19"},
}


@cache
def _numbers() -> dict[tuple[str, str, str], float]:
    with Path(__file__).with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return {
            (r["table"], r["row"], r["column"]): float(r["value"]) for r in csv.DictReader(file)
        }


def number(table: str, row: str, column: str) -> float | None:
    """What the paper prints there, of 100; None where it prints nothing."""
    return _numbers().get((table, row, column))


def rows_of(table: str) -> list[str]:
    """The rows of a table, in its order."""
    return list(dict.fromkeys(row for t, row, _ in _numbers() if t == table))


def average(table: str, row: str, kind: str) -> float | None:
    """The paper's average over its sets of that kind, from the short table where there is one."""
    short = number(SHORT.get(table, ""), row, kind.capitalize())
    return short if short is not None else number(table, row, AVERAGES[kind])
