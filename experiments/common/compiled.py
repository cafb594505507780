"""Rows that the chips' compilers fill in, one program after the other."""

import pathlib
from collections.abc import Callable

from rich.progress import track

from experiments.common import chips, records
from experiments.common.records import Row


def measure_missing(
    path: pathlib.Path,
    missing: Callable[[list[Row]], list[Row]],
    measure: Callable[[Row], Row],
) -> None:
    """Compiles each case that a file has no row for, and appends its row.

    Args:
        path: of the rows.
        missing: from the rows to the cases that are not among them, each with its
            `chip`, or the name of a TPU `pod`.
        measure: compiles a case and returns what its row holds besides.

    Raises:
        ConfigError: a chip's compiler is not installed.
    """
    for case in track(missing(records.resume_rows(path)), "compiling"):
        measured = measure(case)
        platform = "tpu" if "pod" in case else chips.CHIPS[case["chip"]].platform
        versions = records.versions() | chips.versions(platform)
        records.append_row(path, case | measured | versions)
