"""The paper's pretraining datasets (Table F.13), and what is known of a dataset by its name.

catalog.csv has a row for each of the 56 that the table lists, as printed; `note` says where the
paper contradicts itself, `url` and `licence` are empty where we are not sure. Of the whole: the
text counts 57 datasets (Fig. 2: 60; sec. 5.4: 23 + 35), 206 thousand patches where the column
sums to 39,035, and over four million tiles where 100 of each of 24,923 slides are 2.49 million.
"""

from __future__ import annotations

import csv
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.file_config import CatalogConfig
from jaxhisto.special_files import no_pipe

ALMOST = 0.8
"""difflib's ratio from which two names are one of them misspelt: letters swapped or missing."""
COUNTED = {"patches": "images", "slides": "slides"}
SAME_ORGAN = ({"kidney", "renal"}, {"lung", "chest"}, {"marrow", "bone marrow"})
WIDER = {"colorectal": {"colon", "rectum"}}
"""An organ that holds others: asking for it finds those, asking for one of those not it."""


@dataclass(frozen=True)
class Dataset:
    """A row of Table F.13; organ, resolution and staining as printed.

    Fields:
      kind: `slides` or `patches`, which is also what `count` counts.
      citation: of the paper's list of references, where the table has one.
      url: the dataset's own page. licence: of the images. note: ours.
    """

    name: str
    kind: str
    organ: str
    resolution: str
    staining: str
    count: int
    citation: str
    url: str
    licence: str
    note: str


@dataclass(frozen=True)
class About:
    """What is known of a dataset: organ and stain as text, um/px of its images; empty if not."""

    organ: str = ""
    stain: str = ""
    mpp: float | None = None


@functools.cache
def read_catalog() -> tuple[Dataset, ...]:
    """The rows of catalog.csv, in the table's order."""
    text = resources.files("jaxhisto.data").joinpath("catalog.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(Dataset(count=int(row.pop("count")), **row) for row in rows)


def terms(text: str) -> set[str]:
    """The organs or stains that a cell names: `breast, colon` or `Jenner- Giemsa`, made alike."""
    parts = (" ".join(part.casefold().replace("- ", "-").split()) for part in text.split(","))
    return {re.sub(r"(['\u2019]s)?( stain)?$", "", part) for part in parts if part}


def holds(text: str, wanted: Iterable[str]) -> bool:
    """Whether a cell names one of the wanted organs or stains; no wanted ones: True."""
    asked = {name for want in wanted for term in terms(want) for name in _alike(term)}
    return not asked or bool(terms(text) & asked)


def select(
    organ: Sequence[str] = (), stain: Sequence[str] = (), kind: str = ""
) -> tuple[Dataset, ...]:
    """The rows of these organs, stains and kind; nothing given: all.

    Raises:
      ConfigError: a value that no row has, with a suggestion.
    """
    rows = read_catalog()
    refuse_unknown("--organ", organ, known_terms(row.organ for row in rows))
    refuse_unknown("--stain", stain, known_terms(row.staining for row in rows))
    refuse_unknown("--kind", [kind] if kind else [], list(COUNTED))
    return tuple(
        row
        for row in rows
        if holds(row.organ, organ) and holds(row.staining, stain) and kind in ("", row.kind)
    )


def known_terms(cells: Iterable[str]) -> list[str]:
    """All organs or stains of these cells, and the names that stand for several, sorted."""
    found = {term for cell in cells for term in terms(cell)}
    return sorted(found | {name for term in found for name in _alike(term)} | _holding(found))


def refuse_unknown(flag: str, values: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigError for a value that is none of the known ones, with a suggestion."""
    for value in values:
        if not terms(value) <= set(known) or not terms(value):
            near = difflib.get_close_matches(value.casefold(), known, 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ConfigError(f"{flag} {value}: not known; {remedy}")


def name_key(name: str) -> str:
    """What dataset names are compared by: `TCGA-BRCA`, `tcga_brca` and `Tcga brca` are one."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def known_datasets(table: str = "") -> dict[str, tuple[str, About]]:
    """`name_key` -> (name, what is known): the catalogue, and a table of the user's over it.

    Args:
      table: a CSV file with the columns dataset, organ, stain, and mpp (um/px) if wanted; cells
        may be empty. A row replaces the catalogue's.

    Raises:
      StoreError: a file that cannot be read, has other columns, a row twice, or an mpp that is
        no number.
    """
    found = {name_key(r.name): (r.name, About(r.organ, r.staining)) for r in read_catalog()}
    return found | (dict(_user_rows(Path(table))) if table else {})


def nearest_name(name: str, known: Mapping[str, tuple[str, About]], cutoff: float = 0.6) -> str:
    """` (did you mean X?)`, or nothing where no known dataset is called alike.

    Args:
      cutoff: how alike, 0..1 (difflib's ratio).
    """
    near = difflib.get_close_matches(name_key(name), list(known), 1, cutoff)
    return f" (did you mean {known[near[0]][0]!r}?)" if near else ""


def doubts(given: Iterable[str], table: str = "") -> list[str]:
    """A line for each name, organ or stain that is not known and spelt almost as one that is.

    Such a row of the user's table is another dataset, or of another organ, without a word: what
    is new is allowed.

    Args:
      given: names of the datasets that are there.
      table: as of `known_datasets`.
    """
    rows = dict(_user_rows(Path(table))) if table else {}
    printed = {name_key(row.name): row.name for row in read_catalog()}
    here = {name_key(name): (name, About()) for name in sorted(given)}
    lines = [
        f"{name}: is not in the catalogue{' nor in ' + table if table else ''}; {near}"
        for key, (name, _) in here.items()
        if key not in rows.keys() | printed.keys() and (near := _almost(key, printed))
    ]
    lines += [
        f"{table}: {name} is none of the datasets given; {near}"
        for key, (name, _) in rows.items()
        if key not in here.keys() | printed.keys()
        if (near := _almost(key, {k: n for k, (n, _) in here.items() if k not in rows}))
    ]
    for what, column in (("organ", "organ"), ("stain", "staining")):
        usual = known_terms(getattr(row, column) for row in read_catalog())
        lines += [
            f"{table}: the {what} of {name}, {term}, is no other dataset's; {near}"
            for name, about in rows.values()
            for term in sorted(terms(getattr(about, what)) - set(usual))
            if (near := _almost(term, {t: t for t in usual}))
        ]
    return lines


def _almost(key: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(key, list(known), 1, ALMOST)
    return f"did you mean {known[near[0]]!r}?" if near else ""


def listing(config: CatalogConfig) -> list[str]:
    """The lines that `jaxhisto catalog` prints: a table, notes if wanted, the counts last.

    Raises:
      ConfigError: a value that no row has, with a suggestion; values that no row has together.
    """
    rows = select(config.organ, config.stain, config.kind)
    if not rows:
        raise ConfigError(
            "catalog: no dataset is of that organ, stain and kind at once; leave one of them out."
        )
    head = ("name", "kind", "organ", "resolution", "stain", "count", "licence", "where to get it")
    cells = [
        (r.name, r.kind, r.organ, r.resolution, r.staining, f"{r.count:,}", r.licence, r.url)
        for r in rows
    ]
    lines = table_lines([head, *cells], right={5})
    if config.notes:
        lines += [f"{row.name}: {row.note}" for row in rows if row.note]
    counts = [
        f"{len(of)} of {kind} with {sum(r.count for r in of):,} {what}"
        for kind, what in COUNTED.items()
        if (of := [r for r in rows if r.kind == kind])
    ]
    return [*lines, f"{len(rows)} datasets: {', '.join(counts)}"]


def table_lines(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of text as aligned lines, the columns `right` flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _alike(term: str) -> set[str]:
    same = next((group for group in SAME_ORGAN if term in group), {term})
    return same | WIDER.get(term, set())


def _holding(found: set[str]) -> set[str]:
    return {name for name, inside in WIDER.items() if inside & found}


def _user_rows(table: Path) -> Iterator[tuple[str, tuple[str, About]]]:
    try:
        rows = list(csv.DictReader(no_pipe(table).read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{table}: cannot be read ({error}); check --datasets.") from error
    allowed = ["dataset", *(f.name for f in fields(About))]
    for column in rows[0] if rows else ():
        if column not in allowed:
            near = difflib.get_close_matches(str(column), allowed, 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"give {', '.join(allowed)}."
            raise StoreError(f"{table}: unknown column {column!r}; {remedy}")
    seen: set[str] = set()
    for number, row in enumerate(rows, 2):
        name = (row.get("dataset") or "").strip()
        if not name or name_key(name) in seen:
            fact = f"names {name} again" if name else "names no dataset"
            raise StoreError(f"{table}: line {number} {fact}; mend that line.")
        seen.add(name_key(name))
        organ, stain = ((row.get(c) or "").strip() for c in ("organ", "stain"))
        yield name_key(name), (name, About(organ, stain, _mpp(table, number, row.get("mpp"))))


def _mpp(table: Path, number: int, text: str | None) -> float | None:
    if not text or not text.strip():
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not 0.01 <= mpp <= 100:
        raise StoreError(f"{table}: line {number} has mpp {text!r}; give um/px in 0.01..100.")
    return mpp
