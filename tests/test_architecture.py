"""The layers of the package import strictly downward, and only public API of others."""

import ast
from pathlib import Path

import pytest

import flora_jax

ROOT = Path(flora_jax.__file__).parent
# Lower layers first; a module may import its own layer's earlier modules and below.
LAYERS = [
    ["_checks", "_mesh", "_keys", "_plan", "_random", "_rules", "_spec", "_state"],
    ["projections"],
    ["quantization"],
    ["transforms"],
    ["optimizers"],
    ["sharding"],
    ["memory"],
    ["__init__"],
    ["__main__"],
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
# The site's configuration lies in docs, and is no part of the package.
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "docs")


def imported(path):
    """Names of the modules that a file imports, TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module):
    """The part of the package that a module belongs to, or None for `flora_jax`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_import_downward(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imported(path):
        if module.startswith("flora_jax."):
            there = part(module)
            if there in LEVEL:
                assert LEVEL[there] <= LEVEL[here], f"{path} imports upward: {module}"
                same_package = there == here or not (ROOT / here).is_dir()
                assert LEVEL[there] < LEVEL[here] or same_package


def test_every_part_has_a_layer():
    parts = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES}
    assert parts == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_are_public_and_core_only(path):
    allowed = {"flora_jax", "jax", "numpy", "optax", "chex", "jaxtyping"}
    name = str(path.relative_to(ROOT))
    allowed |= LATE.get(name, set())
    top_level = ast.parse(path.read_text()).body
    early = [x for node in top_level for x in direct_imports(node)]
    assert not LATE.get(name, set()) & {x.split(".")[0] for x in early}, path
    for module in imported(path):
        top = module.split(".")[0]
        assert "_src" not in module.split("."), f"{path} imports a private module"
        if top not in allowed:
            assert top in STANDARD_LIBRARY, f"{path} imports {module}"


def direct_imports(node):
    """Modules that a statement of a module imports by itself."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


# What is imported where it is used, if it is installed.
LATE = {"memory/_tables.py": {"rich"}, "memory/_picture.py": {"matplotlib"}}
STANDARD_LIBRARY = set(__import__("sys").stdlib_module_names)


def test_public_names_are_sorted_and_exist():
    order = sorted(flora_jax.__all__, key=lambda name: (not name.isupper(), name))
    assert flora_jax.__all__ == order
    assert all(hasattr(flora_jax, name) for name in flora_jax.__all__)


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not has_nested_functions(node):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                is_factory = node.name in flora_jax.__all__
                assert lines <= 40 or is_factory, (path, node.name, lines)


def has_nested_functions(node):
    return any(isinstance(x, ast.FunctionDef) for x in node.body)


def test_a_recipe_is_short():
    """A method is fewer than 60 lines, all that it adds included."""
    text = (ROOT / "optimizers" / "_galore.py").read_text()
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = text.splitlines()
    code = [x for i, x in enumerate(lines, 1) if x.strip() and i not in skipped]
    assert len(code) < 60
