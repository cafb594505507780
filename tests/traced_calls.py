"""Counts the Python calls of an update while jax traces it: how many hands it takes.

``python -m tests.traced_calls`` prints the figures, ``--functions`` also which
functions are called, and how often.
"""

import argparse
import collections
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import flora_jax as fj

PARAMS = {"w": jnp.ones((256, 512))}


def calls(tx, package):
    """Calls of a package's functions while an update of PARAMS is traced.

    Functions and lambdas count; comprehensions and generators, which later versions of
    Python inline, do not.

    Args:
      tx: the transformation.
      package: the module of the package whose functions are counted.

    Returns:
      A counter of (file, function).
    """
    root = str(pathlib.Path(package.__file__).parent)
    found = collections.Counter()

    def note(frame, event, _):
        code = frame.f_code
        named = not code.co_name.startswith("<") or code.co_name == "<lambda>"
        if event == "call" and named and code.co_filename.startswith(root):
            file = code.co_filename.removeprefix(root).lstrip("/")
            found[file, code.co_name] += 1

    state = tx.init(PARAMS)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS)
    finally:
        sys.setprofile(before)
    return found


def figures():
    """By name: a counter as of :func:`calls`; each of a sketch that no other has."""
    keys = iter(range(10**6, 10**6 + 10))
    ours = {
        "flora": lambda s: fj.flora(1e-3, s),
        "compressed_accumulation": lambda s: fj.compressed_accumulation(
            optax.sgd(1.0), 4, s
        ),
        "flora_adamw": lambda s: fj.flora_adamw(1e-3, s),
        "flora_muon": lambda s: fj.flora_muon(1e-3, s),
    }
    theirs = {
        "optax.adafactor": optax.adafactor(1e-3, momentum=0.9),
        "optax.contrib.muon": optax.contrib.muon(1e-3),
    }
    return {
        **{k: calls(f(fj.Sketch(32, key=next(keys))), fj) for k, f in ours.items()},
        **{name: calls(tx, optax) for name, tx in theirs.items()},
    }


def table(found):
    """The figures as text."""
    return "\n".join(
        f"{name:24} {counter.total():4} calls in {len({x[0] for x in counter}):2} files"
        for name, counter in found.items()
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--functions", action="store_true", help="also print the count of each function"
    )
    found, arguments = figures(), parser.parse_args()
    print(table(found))
    if arguments.functions:
        for name, counter in found.items():
            print(f"\n{name}")
            for (file, function), count in counter.most_common():
                print(f"  {count:4} {file}: {function}")


if __name__ == "__main__":
    main()
