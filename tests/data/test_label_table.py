"""Tables as people and their programs write them: read where that is safe, else one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxhisto.data.label_table import label_rows, same_but_for_case, strangers
from jaxhisto.errors import StoreError

SOUND = "file,grade,patient\na.png,low,p1\nb.png,high,p2\n"
ROWS = {"a.png": ("low", "p1"), "b.png": ("high", "p2")}


def read(tmp_path: Path, text: str | bytes, group: str = "patient"):
    table = tmp_path / "t.csv"
    table.write_bytes(text.encode() if isinstance(text, str) else text)
    return label_rows(table, tmp_path, "file", "grade", group)


@pytest.mark.parametrize(
    "text",
    [
        SOUND,
        "\ufeff" + SOUND,
        SOUND.replace("\n", "\r\n"),
        SOUND.replace("\n", "\r"),
        SOUND.replace(",", " , "),
        SOUND.replace("low", '"low"'),
        SOUND + "\n,,\n  ,,\n",
        SOUND.replace("\n", "\n\n"),
        SOUND.replace("a.png", "./a.png"),
    ],
)
def test_what_spreadsheets_add_is_no_part_of_a_table(tmp_path, text):
    assert read(tmp_path, text) == ROWS


def test_a_comma_in_quotes_is_part_of_a_cell(tmp_path):
    assert read(tmp_path, SOUND.replace("low", '"low, usual"'))["a.png"] == ("low, usual", "p1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SOUND + ",low,p1\n", "line 4 names no image; fill it in, or remove the line"),
        (SOUND.replace("p2", "nan"), "line 3 has patient 'nan', which is none; .* unknown group"),
        (SOUND.replace("p2", "#N/A"), "line 3 has patient '#N/A', which is none"),
        (SOUND.replace("p2", " "), "line 3 has no patient;"),
        (SOUND.encode("utf-16"), r"is not written in UTF-8 \(.* at byte 0\); save it anew as UTF"),
        (SOUND.replace("low", "mäßig").encode("latin-1"), "is not written in UTF-8"),
    ],
)
def test_what_could_be_read_wrongly_is_refused(tmp_path, text, said):
    with pytest.raises(StoreError, match=said):
        read(tmp_path, text)


def test_a_group_without_label_is_never_used(tmp_path):
    assert read(tmp_path, SOUND.replace("high,p2", ",nan"))["b.png"] == ("", "nan")
    assert read(tmp_path, SOUND.replace("p2", "nan"), group="")["b.png"] == ("high", "")


def test_names_that_differ_in_case_alone():
    assert same_but_for_case(["P1", "p2", "p1", "P3", "P1"]) == [["P1", "p1"]]
    assert same_but_for_case(["a", "b"]) == []


def test_names_from_another_folder_than_the_one_named(tmp_path):
    def said(folder, row, image):
        return strangers(Path("t.csv"), folder, [row], [image])

    assert f"name {tmp_path / 'set/images'} as the folder" in said(
        tmp_path / "set", "a.png", "images/a.png"
    )
    assert f"name {tmp_path / 'set'} as the folder" in said(
        tmp_path / "set" / "images", "images/a.png", "a.png"
    )
    assert f"name {tmp_path} as the folder" in said(
        tmp_path / "set" / "images", "set/images/a.png", "a.png"
    )
    assert "write them as they are" in said(tmp_path / "set", "elsewhere/a.png", "a.png")
    assert "write them as they are" in said(tmp_path / "set", "b.png", "a.png")
