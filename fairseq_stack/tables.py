"""Tables as Markdown that also line up as plain text."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table. The first column is aligned left; the others hold numbers and are aligned right.

    Args:
        header: titles of the columns.
        rows: for each row, its cells: as many as the header has titles.
    """
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        for first, *rest in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
