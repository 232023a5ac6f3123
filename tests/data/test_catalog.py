"""The catalogue against the printed table, and what is found in it by name, organ and stain."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from jaxhisto.cli import main
from jaxhisto.data.catalog import doubts, known_datasets, read_catalog, select, terms
from jaxhisto.errors import ConfigError, StoreError


def test_each_row_is_the_printed_one(shared_docs) -> None:
    text = (shared_docs / "paper.txt").read_text(encoding="utf-8")
    table = text[text.index("Table F.13: Datasets used") :]
    patches, slides = table.split("Whole-Slide Datasets")
    printed = [
        re.findall(rf"^ *(\S.*\d {kind})$", part, re.MULTILINE)
        for part, kind in ((patches, "patch"), (slides, "WSI"))
    ]
    kinds = {"patches": "patch", "slides": "WSI"}
    rows = [
        f"{r.name}{f' ({r.citation})' if r.citation else ''} {r.organ} {r.resolution} "
        f"{r.staining} {r.count} {kinds[r.kind]}"
        for r in read_catalog()
    ]
    assert [len(lines) for lines in printed] == [22, 34]
    assert rows == printed[0] + printed[1]


def test_the_sums_are_the_columns_and_not_the_texts() -> None:
    sums: Counter[str] = Counter()
    for row in read_catalog():
        sums[row.kind] += row.count
    assert sums == {"patches": 39_035, "slides": 24_923}
    assert len({row.name for row in read_catalog()}) == 56


def test_where_to_get_it_names_a_page_of_the_dataset() -> None:
    rows = {row.name: row for row in read_catalog()}
    for row in rows.values():
        assert not row.url or re.fullmatch(r"https?://[\w.-]+/\S*", row.url), row
    # Two we are not sure of; an empty cell is an answer.
    assert [n for n, r in rows.items() if not r.url] == ["ramtab", "warwick beta cell dataset"]
    assert "validation task Lymph" in rows["andrewjanowczyk lymphoma"].note


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("breast, colon", {"breast", "colon"}),
        ("Jenner- Giemsa", {"jenner-giemsa"}),
        ("Wright’s stain", {"wright"}),  # noqa: RUF001  # as printed
        ("PAS, Wright", {"pas", "wright"}),
        ("", set()),
    ],
)
def test_cells_are_made_alike(cell, found) -> None:
    assert terms(cell) == found


def test_organs_are_found_under_both_names_and_inside_wider_ones() -> None:
    kidney = {row.name for row in select(organ=["kidney"])}
    assert kidney == {"TCGA-KICH", "TCGA-KIRC", "TCGA-KIRP", "CPTAC-CCRCC"}
    assert {row.name for row in select(organ=["renal"])} == kidney
    colorectal = {row.name for row in select(organ=["colorectal"])}
    assert {"TCGA-READ", "TCGA-COAD", "glas 2015", "CRCHistoPhenotypes"} <= colorectal
    assert "CRCHistoPhenotypes" not in {row.name for row in select(organ=["colon"])}
    assert "lyon2019" in {row.name for row in select(organ=["breast"])}
    assert len(select(organ=["breast", "lymph node"], kind="slides")) == 5
    assert len(select()) == 56


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--organ", "braest"], "--organ braest: not known; did you mean 'breast'?"),
        (["--organ", "lymph"], "did you mean 'lymph node'?"),
        (["--stain", "HE"], "did you mean 'h&e'?"),
        (["--kind", "slide"], "did you mean 'slides'?"),
        (["--kind", "slides", "--stain", "fluorescence"], "--stain fluorescence: not known"),
        (["--kind", "slides", "--organ", "bone"], "no dataset is of that organ"),
    ],
)
def test_what_no_row_has_is_refused(capsys, flags, said) -> None:
    assert main(["catalog", *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_last_line_counts(capsys) -> None:
    assert main(["catalog", "--organ", "breast", "--stain", "H&E", "--notes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "kind", "organ"]
    assert any(line.startswith("SLN-Breast: organ printed as breast") for line in lines)
    # 125 + 311 + 142 + 3975 + 100 + 50 + 922; 1987 + 821 + 130
    assert lines[-1] == "10 datasets: 7 of patches with 5,625 images, 3 of slides with 2,938 slides"


def test_a_users_table_is_put_over_the_catalogue(tmp_path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text("dataset,organ,stain,mpp\nHer2ST,breast,H&E,0.688\ntcga_brca,skin,,\n")
    known = known_datasets(str(table))
    assert known["her2st"][1].mpp == 0.688
    assert known["tcga brca"][1].organ == "skin"
    assert known["tcga coad"][1].organ == "colon"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dataset,orgn\na,b\n", "unknown column 'orgn'; did you mean 'organ'?"),
        ("dataset,organ\na,b\nA,c\n", "line 3 names A again"),
        ("dataset,organ\n,b\n", "line 2 names no dataset"),
        ("dataset,mpp\na,x\n", "line 2 has mpp 'x'"),
        ("dataset,mpp\na,0\n", "line 2 has mpp '0'"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, said) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(StoreError, match=re.escape(said)):
        known_datasets(str(tmp_path / "mine.csv"))
    with pytest.raises(StoreError, match=r"other\.csv: cannot be read"):
        known_datasets(str(tmp_path / "other.csv"))


def test_rows_spelt_almost_as_known_ones_are_named_and_new_ones_are_not(tmp_path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text(
        "dataset,organ,stain\nHER2TS,braest,H&E\nmine,tongue,HE&\nTCGA-LUAD,,\nlater,lung,IHC\n"
    )
    given = ["TCGA-BRAC", "HER2ST", "mine", "entirely new", "glas 2015"]
    assert doubts(given, str(table)) == [
        f"TCGA-BRAC: is not in the catalogue nor in {table}; did you mean 'TCGA-BRCA'?",
        f"{table}: HER2TS is none of the datasets given; did you mean 'HER2ST'?",
        f"{table}: the organ of HER2TS, braest, is no other dataset's; did you mean 'breast'?",
    ]
    assert doubts(["tcga_brca", "entirely new"]) == []
    assert doubts(["TCGA-BRAC"]) == [
        "TCGA-BRAC: is not in the catalogue; did you mean 'TCGA-BRCA'?"
    ]


def test_no_name_of_the_catalogue_is_taken_for_another() -> None:
    assert doubts(row.name for row in read_catalog()) == []


def test_no_organ_at_all_is_no_organ() -> None:
    with pytest.raises(ConfigError, match="not known"):
        select(organ=[""])
