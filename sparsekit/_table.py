"""Lays out tables of text: what reports and examples print."""

import textwrap
from collections.abc import Sequence

WIDTH = 118  # of a line
LEAST = 30  # of a wrapped column, however little of the line is left for it


def table_lines(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Returns the lines of a table.

    A last column that is left-aligned is wrapped, so that no line is longer than 118 characters.

    Args:
        rows: the cells of each row, the head first.
        align: a character for each column: ``"<"`` aligns it left, as text, and ``">"`` right, as numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    before = sum(width + 2 for width in widths[:-1])
    if align[-1] == "<":
        widths[-1] = max(WIDTH - before, LEAST)
    lines = []
    for row in rows:
        text = textwrap.wrap(row[-1], widths[-1], break_on_hyphens=False) if align[-1] == "<" else [row[-1]]
        first, *more = text or [""]
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip([*row[:-1], first], align, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
        lines += [" " * before + text for text in more]
    return lines
