"""The main job over seeds: the runs as JSON lines, and a table of means.

python -m experiments.main_job.seeds OUTPUT_DIR RUN_DIR...
"""

import json
import pathlib
import sys

from experiments.common import records
from experiments.common.report import markdown, written


def main(output: pathlib.Path, folders: list[pathlib.Path]) -> None:
    """Writes `seeds.jsonl` and `seeds.md` of finished jobs that differ in the seed."""
    rows = []
    for folder in folders:
        content = json.loads((folder / "results.json").read_text())
        seed = content["config"]["seed"]
        rows += [{"seed": seed} | row for row in content["rows"]]
    output.mkdir(parents=True, exist_ok=True)
    (output / "seeds.jsonl").unlink(missing_ok=True)
    for row in rows:
        records.append_row(output / "seeds.jsonl", row)
    titles = list(dict.fromkeys(row["title"] for row in rows))
    groups = [[row for row in rows if row["title"] == title] for title in titles]
    columns = {
        "method": lambda group: group[0]["title"],
        "optimizer state (bytes)": lambda group: f"{group[0]['state_bytes']:,}",
        "its matrices (bytes)": lambda group: f"{group[0]['matrix_bytes']:,}",
        "kept": lambda group: group[0]["kept"],
        "validation loss": lambda group: written(
            [row["validation_loss"] for row in group]
        ),
    }
    (output / "seeds.md").write_text(markdown(columns, groups))


if __name__ == "__main__":
    destination, *sources = map(pathlib.Path, sys.argv[1:])
    main(destination, sources)
