"""A table of texts, as CSV, Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
         "<": "$<$", ">": "$>$", "|": r"\textbar{}", "±": r"$\pm$"}  # fmt: skip


NONE = "-"  # where there is no number


@dataclass(frozen=True)
class Grid:
    """Fields: a name for files, a title, the header, rows of as many texts, and what to know.

    The first `labels` columns are texts, the others numbers.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    labels: int = 1

    def csv(self) -> str:
        """RFC 4180, but for line feeds alone."""
        held = io.StringIO()
        writer = csv.writer(held, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        return held.getvalue()

    def markdown(self) -> str:
        """A pipe table below its title."""
        body = [[cell.replace("|", r"\|") for cell in row] for row in (self.header, *self.rows)]
        widths = [max(len(row[i]) for row in body) for i in range(len(self.header))]
        rule = [("-" * w if i < self.labels else "-" * (w - 1) + ":") if w > 1 else "-"
                for i, w in enumerate(widths)]  # fmt: skip
        lines = [_padded(body[0], widths), _padded(rule, widths)]
        lines += [_padded(row, widths) for row in body[1:]]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])

    def latex(self) -> str:
        """A `table` with booktabs' rules."""
        columns = "l" * self.labels + "r" * (len(self.header) - self.labels)
        # The braces: \\ takes a [ or * that begins the next line for its own.
        lines = ["{}" * (row[0][:1] in ("[", "*")) + " & ".join(map(_tex, row)) + r" \\"
                 for row in (self.header, *self.rows)]  # fmt: skip
        return "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                r"\begin{table}",
                rf"\caption{{{_tex(' '.join(filter(None, [self.title + '.', self.note])))}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def html(self) -> str:
        """A `div` with the table."""
        head = "".join(f"<th{self._kind(i)}>{escape(c)}" for i, c in enumerate(self.header))
        body = "".join(
            "<tr>" + "".join(f"<td{self._kind(i)}>{escape(c)}" for i, c in enumerate(row)) + "</tr>"
            for row in self.rows
        )
        note = f"<p class=note>{escape(self.note)}</p>" if self.note else ""
        return (
            f"<h3>{escape(self.title)}</h3>{note}<div class=scroll><table><thead><tr>{head}</tr>"
            f"</thead><tbody>{body}</tbody></table></div>"
        )

    def _kind(self, column: int) -> str:
        return "" if column < self.labels else " class=n"


def decimals_of(values: Sequence[float]) -> int:
    """Decimals that show three digits of the largest: 1 of 13.5, 2 of 6.62, 3 of 0.081."""
    largest = max((abs(v) for v in values if v == v), default=0.0)
    return 1 if largest >= 10 else 2 if largest >= 1 else 3


def number(value: float | None, decimals: int, sign: bool = False) -> str:
    """A number for a person; `NONE` for NaN or None. A zero has no sign."""
    if value is None or value != value:
        return NONE
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    return text.replace("-", "").replace("+", "") if float(text) == 0 else text


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"


def _tex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)
