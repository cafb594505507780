"""The layers of the package import strictly downward, and only public API of others."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import flora_jax

ROOT = Path(flora_jax.__file__).parent
# Lower layers first. The first three are modules that all layers share.
LAYERS = [
    "_typing",
    "_validation",
    "_xla",
    "random",
    "leaves",
    "projections",
    "sketching",
    "quantization",
    "subspace",
    "transforms",
    "sketched_grad",
    "optimizers",
    "sharding",
    "memory",
    "diagnostics",
    "cli",
    "__init__",
    "__main__",
]
LEVEL = {name: i for i, name in enumerate(LAYERS)}
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: str(path.relative_to(ROOT))
)


def layer_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Modules that a file imports, in functions and for type checkers as well.

    ``from x import y`` gives x.y where that is a module of the package, else x.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if is_module(name) else node.module


def is_module(name):
    path = ROOT.joinpath(*name.split(".")[1:])
    if not name.startswith("flora_jax."):
        return False
    # A recipe and its module have the same name.
    package, _, last = name.rpartition(".")
    exported = last in getattr(importlib.import_module(package), "__all__", ())
    return not exported and (path.is_dir() or path.with_suffix(".py").exists())


@every_file
def test_layers_import_strictly_downward(path):
    here = layer_of(path)
    for module in imported(path):
        names = module.split(".")
        if names[0] != "flora_jax" or module == "flora_jax":
            # Only what stands above all of it imports the package as its users do.
            assert module != "flora_jax" or here in ("cli", "__main__"), path
            continue
        there = names[1]
        if there != here:
            assert LEVEL[there] < LEVEL[here], f"{path} imports upward: {module}"
            private = any(x.startswith("_") for x in names) and there not in LAYERS[:3]
            assert not private, f"{path} imports a private module: {module}"


@every_file
def test_modules_of_a_package_import_one_another_without_circles(path):
    assert path not in reachable(path), f"{path} imports itself in the end"


def reachable(path):
    """All files of the same package that a file imports, directly or not."""
    found, waiting = set(), [path]
    while waiting:
        for module in imported(waiting.pop()):
            names = module.split(".")[1:]
            file = ROOT.joinpath(*names).with_suffix(".py")
            if file.parent == path.parent and file.exists() and file not in found:
                found.add(file)
                waiting.append(file)
    return found


def test_every_part_has_a_layer():
    assert {layer_of(path) for path in FILES} == set(LAYERS)


def test_modules_of_packages_have_plain_names():
    for path in FILES:
        if path.parent != ROOT and path.name != "__init__.py":
            assert not path.name.startswith("_"), path


# What is imported where it is used, if it is installed.
LATE = {
    "cli/picture.py": {"matplotlib"},
    "memory/planner.py": {"rich"},
}


@every_file
def test_only_jax_and_optax_are_needed(path):
    late = LATE.get(str(path.relative_to(ROOT)), set())
    allowed = {"flora_jax", "jax", "numpy", "optax", "chex", "jaxtyping"} | late
    for module in imported(path):
        top = module.split(".")[0]
        assert "_src" not in module.split("."), f"{path} imports a private module"
        known = top in allowed or top in sys.stdlib_module_names
        assert known, f"{path} imports {module}"
    at_once = {
        module.split(".")[0]
        for node in ast.parse(path.read_text()).body
        for module in direct_imports(node)
    }
    assert not late & at_once, path


def direct_imports(node):
    """Modules that a statement of a module imports by itself."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def test_nothing_is_handed_on_beside_the_arguments():
    """No context variable, no thread-local and no global that functions rebind."""
    for path in FILES:
        modules = set(imported(path))
        assert not modules & {"contextvars", "threading"}, path
        nodes = list(ast.walk(ast.parse(path.read_text())))
        assert not any(isinstance(node, ast.Global) for node in nodes), path


def test_public_names_are_sorted_and_exist():
    order = sorted(flora_jax.__all__, key=lambda name: (not name.isupper(), name))
    assert flora_jax.__all__ == order
    assert all(hasattr(flora_jax, name) for name in flora_jax.__all__)
