"""A table as CSV, Markdown, LaTeX and HTML says what its cells say, whatever they hold."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest

from jaxhisto.study.grids import Grid, decimals_of, number

ODD = Grid(
    "t", "Odd & <title>", ("Encoder", "p, 100 %"),
    (("[mine] a_b|c", "< 0.0001"), ('* "x" \\ {y} ~^#$', "1.0 ± 0.2")), "note: 5 % > 4",
)  # fmt: skip


def test_csv_is_read_back():
    assert list(csv.reader(io.StringIO(ODD.csv()))) == [list(ODD.header), *map(list, ODD.rows)]


def test_markdown_has_a_cell_a_cell():
    lines = [line for line in ODD.markdown().splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert {len(line) for line in lines} == {len(lines[0])}


def test_html_says_the_same():
    class Cells(HTMLParser):
        cells: list[str]

        def handle_starttag(self, tag, attrs):
            if tag in ("td", "th"):
                self.cells.append("")

        def handle_data(self, data):
            if self.cells:
                self.cells[-1] += data

    parser = Cells()
    parser.cells = []
    parser.feed(ODD.html().split("<table>")[1].split("</table>")[0])
    assert parser.cells == [cell for row in (ODD.header, *ODD.rows) for cell in row]


def test_latex_holds_nothing_that_it_takes_for_its_own():
    body = ODD.latex().split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert body == [
        r"{}[mine] a\_b\textbar{}c & $<$ 0.0001 \\",
        r"""{}* "x" \textbackslash{} \{y\} \textasciitilde{}\textasciicircum{}\#\$ & """
        r"1.0 $\pm$ 0.2 \\",
    ]
    assert r"Odd \& $<$title$>$. note: 5 \% $>$ 4" in ODD.latex()


@pytest.mark.parametrize(
    ("value", "decimals", "sign", "text"),
    [(0.04, 1, True, "0.0"), (-0.04, 1, False, "0.0"), (-1.25, 1, True, "-1.2"),
     (3.0, 2, True, "+3.00"), (float("nan"), 1, False, "-"), (None, 1, False, "-")],
)  # fmt: skip
def test_numbers_for_a_person(value, decimals, sign, text):
    assert number(value, decimals, sign) == text


def test_three_digits_of_the_largest():
    assert [decimals_of([v, float("nan")]) for v in (-13.5, 6.62, 0.081)] == [1, 2, 3]
    assert decimals_of([]) == 3
