"""Rows that the chips' compilers fill in, one program after the other."""

import pathlib
from collections.abc import Callable, Iterable

from rich.progress import track

from experiments.common import chips, records
from experiments.common.records import Row


def measure_missing(
    path: pathlib.Path, cases: Iterable[Row], measure: Callable[[Row], Row]
) -> None:
    """Compiles each case that a file has no row for, and appends its row.

    Args:
        path: of the rows.
        cases: each with its `chip`, or the name of a TPU `pod`.
        measure: compiles a case and returns what its row holds besides.

    Raises:
        ConfigError: a chip's compiler is not installed.
    """
    missing = records.not_measured(records.resume_rows(path), cases)
    for case in track(missing, "compiling"):
        measured = measure(case)
        platform = "tpu" if "pod" in case else chips.CHIPS[case["chip"]].platform
        versions = records.versions() | chips.versions(platform)
        records.append_row(path, case | measured | versions)
