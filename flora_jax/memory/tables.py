"""Tables of bytes as plain text, or by rich."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flora_jax._typing import Shape
    from flora_jax.memory.planner import LeafMemory, MemoryPlan

# Index of a layer: h.11.attn, layers/3/kernel, Dense_2.
_INDEX = re.compile(r"(?:(?<=[./_])|^)\d+(?=[./]|$)")


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


def leaf_table(plan: MemoryPlan) -> Table:
    """A row per parameter, those of equal layers in one, and one for the rest."""
    total = max(plan.state_bytes, 1)
    alike: dict[tuple[str, ...], list[LeafMemory]] = {}
    for leaf in plan.leaves:
        shape = _product(leaf.shape)
        sketches = "; ".join(f"{shape} -> {_product(x)}" for x in leaf.sketches)
        row = (_INDEX.sub("*", leaf.path), shape, leaf.dense_reason or sketches)
        alike.setdefault((*row, str(leaf.state_bytes)), []).append(leaf)
    rows = []
    for (path, shape, how, _), leaves in alike.items():
        size = sum(leaf.state_bytes for leaf in leaves)
        if len(leaves) == 1:
            path = leaves[0].path
        else:
            shape = f"{len(leaves)} of {shape}" if shape else f"{len(leaves)} scalars"
        rows.append((path, shape, format_bytes(size), f"{size / total:.0%}", how))
    other = format_bytes(plan.other_bytes), f"{plan.other_bytes / total:.0%}"
    rows.append(("other", "", *other, "counters, keys"))
    where = " on a device" if plan.per_device else ""
    heads = ("leaf", "shape", f"state{where}", "share", "sketched as, or why not")
    return Table(heads, rows, (0, 4))


def total_table(plan: MemoryPlan) -> Table:
    """Parameters, state, and the states of the peers."""
    sizes = {"parameters": plan.parameter_bytes, "state": plan.state_bytes}
    rows = [
        (name, format_bytes(size), f"{size / max(plan.parameter_bytes, 1):.0%}")
        for name, size in {**sizes, **plan.peers}.items()
    ]
    where = " on a device" if plan.per_device else ""
    return Table(("total", f"bytes{where}", "of parameters"), rows, (0,))


def _product(shape: Shape) -> str:
    return "x".join(map(str, shape))


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
