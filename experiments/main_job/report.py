"""The table at the end, on the screen and as a Markdown file."""

import pathlib
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.common.records import Summary
from experiments.main_job import plots

_COLUMNS = (
    "method",
    "optimizer\nstate",
    "momentum or\naccumulator",
    "its\nmatrices",
    "kept",
    "s/update",
    "train\nloss",
    "valid.\nloss",
)
_LEGEND = (
    "Bytes: of the whole optimizer state; of the buffer that FLORA compresses; of its "
    "part in the compressible matrices, and how much of their full size that is. "
    "s/update: median wall time, all micro-batches, no compilation. Losses in nats per "
    "token: training mean over the last tenth of the updates; validation after the "
    "last one, on a fixed set."
)


def write(summaries: Sequence[Summary], folder: pathlib.Path, console: Console) -> None:
    """Prints the table; writes it and the two pictures into `folder`."""
    plots.loss_curves(summaries, folder / "loss_curves.png")
    plots.memory_bars(summaries, folder / "memory.png")
    (folder / "report.md").write_text(_markdown(summaries))
    console.print(_headline(summaries), highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for column in _COLUMNS:
        # The names may be folded on a narrow screen, the numbers not.
        is_name = column == _COLUMNS[0]
        table.add_column(
            column, justify="left" if is_name else "right", no_wrap=not is_name
        )
    for summary in summaries:
        table.add_row(*_cells(summary))
    console.print(table)
    console.print(_LEGEND, highlight=False)
    for line in _byte_lines(summaries):
        console.print(line, highlight=False)


def _headline(summaries: Sequence[Summary]) -> str:
    first = summaries[0]
    return (
        f"GPT-2 of {first.bytes.parameters:,} bytes of parameters, "
        f"{first.bytes.compressible_parameters:.1%} of them in compressible matrices; "
        f"{first.updates} updates of {first.tokens_per_update:,} tokens"
    )


def _cells(summary: Summary) -> list[str]:
    state = summary.bytes
    return [
        summary.title,
        f"{state.state:,}",
        f"{state.buffer:,}",
        f"{state.compressible:,}",
        str(state.kept),
        f"{summary.step_seconds:.3f}",
        f"{summary.train_loss:.3f}",
        f"{summary.validation_loss:.3f}",
    ]


def _byte_lines(summaries: Sequence[Summary]) -> list[str]:
    """Says of each compressed method whether its bytes are what was promised."""
    lines = []
    for summary in summaries:
        state = summary.bytes
        if not summary.compressed:
            continue
        verdict = (
            "which is rank/width, to the byte, in every leaf"
            if state.rank_over_width
            else "which is NOT rank/width in every leaf"
        )
        lines.append(
            f"{summary.title}: {state.compressible:,} of "
            f"{state.compressible_in_full:,} bytes in matrices, "
            f"{state.kept}, {verdict}."
        )
    return lines


def _markdown(summaries: Sequence[Summary]) -> str:
    rule = ["---"] + ["---:"] * (len(_COLUMNS) - 1)
    header = [column.replace("\n", " ") for column in _COLUMNS]
    rows = [header, rule, *map(_cells, summaries)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    checks = "\n".join(f"- {line}" for line in _byte_lines(summaries))
    rates = ", ".join(f"{s.title} {s.learning_rate:g}" for s in summaries)
    return f"""# {_headline(summaries)}

{table}

{_LEGEND}

{checks}
- Peak learning rates: {rates}.
- The trainings took turns, an update each: what else the machine did slowed all alike.
- Each (micro-)step still forms the full gradient, {summaries[0].bytes.parameters:,}
  bytes for a moment; what is compressed lives on between the steps.

![Loss of each method over the updates](loss_curves.png)

![Bytes of each optimizer's state](memory.png)
"""
