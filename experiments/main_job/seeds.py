"""The main job over seeds: the runs as JSON lines, and a table of means.

python -m experiments.main_job.seeds OUTPUT_DIR RUN_DIR...
"""

import json
import pathlib
import sys

from experiments.common import records
from experiments.common.report import grouped, markdown, written


def main(output: pathlib.Path, folders: list[pathlib.Path]) -> None:
    """Writes `seeds.jsonl` and `seeds.md` of finished jobs that differ in the seed."""
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    rows = [
        {"seed": job["config"]["seed"]} | row for job in found for row in job["rows"]
    ]
    records.write_rows(output / "seeds.jsonl", rows)
    columns = {
        "method": lambda group: group[0]["title"],
        "optimizer state (bytes)": lambda group: f"{group[0]['state_bytes']:,}",
        "its matrices (bytes)": lambda group: f"{group[0]['matrix_bytes']:,}",
        "kept": lambda group: group[0]["kept"],
        "validation loss": lambda group: written([x["validation_loss"] for x in group]),
    }
    (output / "seeds.md").write_text(markdown(columns, grouped(rows, "title").values()))


if __name__ == "__main__":
    destination, *sources = map(pathlib.Path, sys.argv[1:])
    main(destination, sources)
