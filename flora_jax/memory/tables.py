"""Tables of bytes as plain text, or by rich."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple


class Table(NamedTuple):
    """Cells as text.

    Attributes:
      heads: of the columns.
      rows: of cells.
      left: indices of the columns that are aligned to the left.
    """

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: tuple[int, ...]


def format_bytes(size: float) -> str:
    """Three digits and a binary unit: 1536 is 1.50 KiB."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 999.5 or unit == "TiB":
            break
    return f"{size:.{max(0, 2 - len(str(int(size))) + 1)}f} {unit}"


def text(table: Table) -> str:
    """The table with padded columns."""
    lines = [table.heads, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = [
            cell.ljust(width) if i in table.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, lines))


def show(tables: list[Table]) -> None:
    """Prints tables, with rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        print("\n\n".join(map(text, tables)))
        return
    import rich.console
    import rich.markup
    import rich.table

    console = rich.console.Console()
    for table in tables:
        shown = rich.table.Table(*table.heads)
        for i, column in enumerate(shown.columns):
            column.justify = "left" if i in table.left else "right"
            column.overflow = "fold"
        for row in table.rows:
            shown.add_row(*map(rich.markup.escape, row))
        console.print(shown)
