"""Tables that show as HTML in a notebook and a report, and as aligned text in a terminal."""

import html
from collections.abc import Sequence


class Html(str):
    """Text of a cell that is HTML already, such as a link."""


class Table:
    """Rows of text under a head, or without one where `head` is empty; every row has as many cells."""

    def __init__(self, head: Sequence[str], rows: Sequence[Sequence[str]]):
        self.head, self.rows = tuple(head), [tuple(row) for row in rows]
        lengths = {len(row) for row in self.rows} | ({len(self.head)} if head else set())
        if len(lengths) > 1:
            raise ValueError(f"the rows of a table have different numbers of cells: {sorted(lengths)}")

    def __str__(self) -> str:
        lines = [self.head, *self.rows] if self.head else self.rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    __repr__ = __str__  # what is stored beside the HTML, and compared

    def markdown(self) -> str:
        """As GitHub shows it, in a job's summary."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def _repr_html_(self) -> str:
        head = [_row("th", self.head)] if self.head else []
        return f"<table>{''.join(head + [_row('td', row) for row in self.rows])}</table>"


class Folded:
    """A table behind a line, which a click unfolds in a notebook; as text the line alone."""

    def __init__(self, line: str, table: Table):
        self.line, self.table = line, table

    def __str__(self) -> str:
        return self.line

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<details><summary>{html.escape(self.line)}</summary>{self.table._repr_html_()}</details>"


def _row(tag: str, cells: Sequence[str]) -> str:
    written = (cell if isinstance(cell, Html) else html.escape(cell) for cell in cells)
    return "<tr>" + "".join(f"<{tag} style='text-align:left'>{cell}</{tag}>" for cell in written) + "</tr>\n"


def short(value: float, digits: int = 4) -> str:
    """A number to read: 12,345 or 0.01234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
