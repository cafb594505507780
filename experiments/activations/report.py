"""Table and picture of what sketches in place of activations save."""

import operator
import pathlib

from experiments.common import plots, report
from experiments.common.records import Row, read_rows

_GIB = 2**30
_CASE = ("chip", "model", "layers", "precision", "rank", "batch_size", "length")
_PRODUCTS = {"default": "default", "highest": "in float32"}
_CAPTION = """\
GiB of temporaries on one chip, by its compiler, of a program that computes a loss and
its gradients: `jax.value_and_grad`, or `fj.sketched_value_and_grad` with the input side
of every matrix sketched except embeddings. Float32; on a TPU products round their
operands to bfloat16 unless they are asked to be in float32. "Recomputed" are scanned
layers whose backward pass computes the activations of each again. Operations are those
of the TPU's compiler, which counts one iteration of a loop: they are given for unrolled
layers. Compilation: of full, then of sketched gradients. Nothing was executed, and the
GPU's kernels are not autotuned.
"""


def write(path: pathlib.Path) -> None:
    """Writes table (.md) and picture (.png) beside the rows."""
    cases = pairs(read_rows(path))
    columns = {
        "chip": lambda case: case["chip"],
        "model": lambda case: case["model"],
        "layers": lambda case: case["layers"],
        "products": lambda case: _PRODUCTS[case["precision"]],
        "full": lambda case: f"{case['full'] / _GIB:.2f}",
        "sketched": lambda case: f"{case['sketched'] / _GIB:.2f}",
        "ratio": lambda case: f"{case['ratio']:.2f}",
        "operations, ratio": _operations,
        "compilation, processor s": _seconds,
    }
    text = _CAPTION
    for (rank, rows, length), group in report.grouped(cases, *_CASE[4:]).items():
        text += f"\n## {rows} x {length} tokens, rank {rank:g} of the sketched side\n\n"
        text += report.markdown(columns, group)
    path.with_suffix(".md").write_text(text)
    _draw(path.with_suffix(".png"), cases)


def pairs(rows: list[Row]) -> list[Row]:
    """Returns the cases of which there are full and sketched gradients.

    Args:
        rows: of both.

    Returns:
        For each case temporaries of `full` and of `sketched` gradients, the `ratio` of
        these and of `operations`, and `seconds` of compilation of the two.
    """
    found = []
    for case, group in report.grouped(rows, *_CASE).items():
        by_kind = {row["gradients"]: row for row in group}
        if len(by_kind) < 2:
            continue
        both = full, sketched = by_kind["full"], by_kind["sketched"]
        sizes = {kind: row["temporaries"] for kind, row in by_kind.items()}
        counts = full["operations"], sketched["operations"]
        found.append(
            dict(zip(_CASE, case, strict=True))
            | sizes
            | {"ratio": sizes["sketched"] / sizes["full"]}
            | {"operations": counts[1] / counts[0] if all(counts) else None}
            | {"seconds": [row["compilation"] for row in both]}
        )
    return sorted(found, key=operator.itemgetter("chip", "model", "precision"))


def _operations(case: Row) -> str | None:
    if case["layers"] != "unrolled" or case["operations"] is None:
        return None
    return f"{case['operations']:.2f}"


def _seconds(case: Row) -> str:
    full, sketched = case["seconds"]
    return f"{full:.0f}, {sketched:.0f}"


def _label(case: Row) -> str:
    asked = ", products in float32" if case["precision"] == "highest" else ""
    return f"{case['chip']}, {case['model']}, {case['layers']}{asked}"


def _draw(path: pathlib.Path, cases: list[Row]) -> None:
    """Dots: temporaries of full and of sketched gradients, with a line between them."""
    y = range(len(cases))
    title = (
        "On an H100 sketches save a quarter to a third of the temporaries;\n"
        "of scanned layers on a v5e a fifth, or a third with products in float32"
    )
    with plots.picture(path, (8, 1.4 + 0.26 * len(cases)), title=title) as panels:
        axes = panels[0, 0]
        sizes = {
            kind: [case[kind] / _GIB for case in cases] for kind in ("full", "sketched")
        }
        axes.hlines(y, sizes["full"], sizes["sketched"], color=plots.GREY, zorder=1)
        for number, (kind, x) in enumerate(sizes.items()):
            style = plots.look(number) | {"linestyle": "none"}
            axes.plot(x, y, **style, label=f"{kind} gradients")
        for place, case in zip(y, cases, strict=True):
            right = max(case["full"], case["sketched"]) / _GIB
            axes.annotate(
                f"{case['ratio']:.2f}",
                (right, place),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(y, map(_label, cases), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * max(map(max, sizes.values())))
        axes.set_xlabel("GiB of temporaries; beside the dots: sketched over full")
        plots.legend_below(axes)


if __name__ == "__main__":
    report.main(write)
