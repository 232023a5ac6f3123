"""Tables that people and their programs write: a row an image, read strictly."""

from __future__ import annotations

import csv
import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe

SHOWN = 5
NOTHING = ("nan", "na", "n/a", "#n/a", "<na>", "null")
"""How pandas, R, Excel and databases write a cell without value. Not `none`, which is a grade."""


def label_rows(
    table: Path, folder: Path, file: str, label: str, group: str
) -> dict[str, tuple[str, str]]:
    """(label, group) of each image that a CSV file names; tab-separated where it ends in .tsv.

    Spaces around cells and headings are no part of them, and rows without any cell are none.

    Args:
      folder: of the images; absolute names below it become relative ones.
      file, label, group: headings; of the group it may be empty.

    Raises:
      StoreError: no such file or heading, a row that is cut short, without its image's name or,
        where it has a label, its group, or an image that is listed twice.
    """
    rows: dict[str, tuple[str, str]] = {}
    try:
        with no_pipe(table).open(newline="", encoding="utf-8-sig") as text:
            lines = csv.reader(text, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            columns = [cell.strip() for cell in next(lines, [])]
            for wanted, what in ((file, "file"), (label, "label"), (group, "group")):
                if wanted or what != "group":
                    _check_column(table, columns, wanted, what)
            at = [columns.index(wanted) if wanted else -1 for wanted in (file, label, group)]
            for cells in lines:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"{table}: line {lines.line_num}"
                if len(cells) != len(columns):
                    raise StoreError(f"{where} does not have {len(columns)} cells; mend that line.")
                name, said, of = (cells[i].strip() if i >= 0 else "" for i in at)
                if not name:
                    raise StoreError(f"{where} names no image; fill it in, or remove the line.")
                name = _relative(name, folder)
                if name in rows:
                    raise StoreError(f"{where} lists {name} a second time; keep one.")
                rows[name] = said, of
                if group and said and (not of or is_nothing(of)):
                    fact = f"{group} {of!r}, which is none" if of else f"no {group}"
                    raise StoreError(
                        f"{where} has {fact}; an image of an unknown group could be on both sides "
                        "of a split: fill it in or drop its label."
                    )
    except UnicodeDecodeError as error:
        raise StoreError(
            f"{table}: is not written in UTF-8 ({error.reason} at byte {error.start}); save it "
            'anew as UTF-8 (in Excel: "CSV UTF-8").'
        ) from error
    except (OSError, csv.Error) as error:
        raise StoreError(f"{table}: cannot be read as CSV ({error}); check the file.") from error
    return rows


def is_nothing(cell: str) -> bool:
    """Whether a cell's text is what programs write for no value."""
    return cell.casefold() in NOTHING


def same_but_for_case(names: Iterable[str]) -> list[list[str]]:
    """The names of which there are several that differ in case alone, together, sorted."""
    alike: dict[str, set[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), set()).add(name)
    return sorted(sorted(found) for found in alike.values() if len(found) > 1)


def strangers(table: Path, folder: Path, rows: Sequence[str], images: Sequence[str]) -> str:
    """Why not one row of a table has its image, and how to write the names."""
    composed = [{unicodedata.normalize("NFC", name) for name in names} for names in (rows, images)]
    if composed[0] & composed[1]:  # macOS takes accents apart, and tables are written elsewhere
        return (
            f"{table}: its names and those of the images in {folder} are the same but for how "
            "accents are encoded (Unicode NFC and NFD); write both in one way."
        )
    first, remedy = rows[0], "write them as they are in that folder, with folders in it and suffix"
    # The same names, from a folder above or below: the folder named is the wrong one.
    below = [name.removesuffix(f"/{first}") for name in images if name.endswith(f"/{first}")]
    above = [name for name in images if first.endswith(f"/{name}")]
    if len(below) == 1:
        remedy = f"name {folder / below[0]} as the folder of the images"
    elif above and folder.absolute().as_posix().endswith(f"/{first.removesuffix('/' + above[0])}"):
        levels = first.removesuffix(f"/{above[0]}").count("/")
        remedy = f"name {folder.absolute().parents[levels]} as the folder of the images"
    return (
        f"{table}: none of its {len(rows):,} names is an image of {folder} (the first, "
        f"{first!r}; images are called {images[0]!r}); {remedy}."
    )


def few(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_column(table: Path, columns: Sequence[str], wanted: str, what: str) -> None:
    if not columns:
        raise StoreError(f"{table}: is empty; give a table with a header.")
    if columns.count(wanted) == 1:
        return
    if len(columns) == 1:
        for mark, called in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
            if wanted in columns[0].split(mark):
                raise StoreError(
                    f"{table}: its columns are parted by {called}; save it with commas, or with "
                    "tabs as .tsv."
                )
    if wanted in columns:
        raise StoreError(f"{table}: has two columns {wanted!r}; rename one of them.")
    near = difflib.get_close_matches(wanted, columns, 1) if wanted else []
    remedy = f"did you mean {near[0]!r}?" if near else f"its columns are {few(columns)}."
    fact = f"no column {wanted!r}" if wanted else f"no {what} column is named"
    raise StoreError(f"{table}: {fact}; {remedy}")


def _relative(name: str, folder: Path) -> str:
    """A name as `image_names` has it; absolute ones below the folder are made relative."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        path = path.relative_to(folder.absolute())
    return path.as_posix()
