"""The benchmark of the family as a table: a step, a refresh, and what they keep."""

from collections.abc import Sequence

from experiments.step_time.measure import Row


def of_family(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a line per optimizer, tree and type.

    A refresh is a step in which every matrix gets a new basis.
    """
    lines = [
        "| tree | type | optimizer | rank | step, ms | over AdamW | refresh, ms |"
        " refresh over step | state, MB | temporaries, MB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    refreshes = {_place(row): row for row in rows if row["kind"] == "refresh"}
    for row in rows:
        if row["kind"] == "refresh":
            continue
        refresh = refreshes.get(_place(row))
        cells = [
            row["tree"],
            row["dtype"],
            f"`{row['name']}`",
            row["rank"] or "",
            f"{row['milliseconds']:.0f}",
            f"{row['over_adamw']:.2f}",
            f"{refresh['milliseconds']:.0f}" if refresh else "",
            f"{refresh['over_step']:.1f}" if refresh else "",
            f"{row['state_bytes'] / 1e6:.1f}",
            f"{row['temp_bytes'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _place(row: Row) -> tuple[str, str, str, int | None]:
    return row["tree"], row["dtype"], row["name"], row["rank"]
