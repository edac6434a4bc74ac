"""Tables as Markdown that also line up as plain text."""


def markdown_table(header, rows):
    """A Markdown table: the first column is aligned left, all others, which hold numbers, right.

    Args:
        header: titles of the columns, strings.
        rows: one sequence of strings, as long as the header, for each row.
    """
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        for first, *rest in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
