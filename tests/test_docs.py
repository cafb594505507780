"""The documents: their programs run, their names, arguments and links exist."""

import ast
import dataclasses
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import flora_jax as fj

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))
DOCUMENTS = [
    *PAGES,
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    *sorted(
        str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/*/README.md")
    ),
]


def text(page):
    return (ROOT / page).read_text()


def programs(page):
    return re.findall(r"^```python\n(.*?)^```", text(page), re.S | re.M)


# docs/distributed.md has a test of its own, in test_readme.py.
PROGRAMS = [page for page in PAGES if programs(page) and "distributed" not in page]


def test_every_public_name_is_documented_once():
    listed = [
        name
        for page in sorted(DOCS.glob("api/*.md"))
        for name in re.findall(
            r"^\.\. auto(?:function|class):: (\w+)", page.read_text(), re.M
        )
    ]
    assert sorted(listed) == sorted(fj.__all__)


@pytest.mark.parametrize("page", [page for page in PAGES if "api/" in page])
def test_summary_tables_list_their_page(page):
    tables = re.findall(r"^   (\w+)$", text(page), re.M)
    entries = re.findall(r"^\.\. auto(?:function|class):: (\w+)", text(page), re.M)
    assert tables == entries


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for contents in re.findall(r"```\{toctree\}.*?\n\n(.*?)```", text(page), re.S):
            folder = (ROOT / page).parent
            listed |= {
                str((folder / name).relative_to(DOCS)) for name in contents.split()
            }
    expected = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES}
    assert listed == expected - {"index"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run(page, capsys):
    names = {}
    for block in programs(page):
        exec(compile(block, page, "exec"), names)  # noqa: S102
    capsys.readouterr()


def test_the_guides_have_programs():
    found = {Path(page).stem for page in PROGRAMS}
    assert found == {"quickstart", "planning", "recipes", "sketched_gradients"}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_names_exist(page):
    for name in set(re.findall(r"\bfj\.(\w+)", text(page))):
        assert name in fj.__all__, name


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text(page)):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", sorted({*DOCUMENTS} - {"CHANGELOG.md"}))
def test_modules_of_the_commands_exist(page):
    for module in set(
        re.findall(r"python -m (experiments[\w.]*|flora_jax)", text(page))
    ):
        path = ROOT / module.rstrip(".").replace(".", "/")
        found = path.with_suffix(".py"), path / "__main__.py"
        assert any(file.exists() for file in found), module


# Functions whose arguments the tables of docs/migration.md list in the second column.
TABLES = {
    "fj.flora": fj.flora,
    "fj.galore": fj.galore,
    "fj.compressed_accumulation": fj.compressed_accumulation,
}


def test_arguments_of_the_migration_tables_exist():
    fields = {field.name for field in dataclasses.fields(fj.Sketch)}
    found = set()
    for table in re.findall(r"(?:^\|.*\n)+", text("docs/migration.md"), re.M):
        head, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.splitlines()
        )
        factory = TABLES[head[1].strip("`")]
        found.add(head[1].strip("`"))
        known = inspect.signature(factory).parameters
        for row in rows:
            for name, default in re.findall(r"`([\w.]+)(?:=([^`]+))?`", row[1]):
                if name.startswith("Sketch."):
                    assert name.removeprefix("Sketch.") in fields, name
                    continue
                assert name in known, (head[1], name)
                if default:
                    assert known[name].default == ast.literal_eval(default), name
    assert found == set(TABLES)


def test_citation_and_package_have_one_version():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert f"\nversion: {project['version']}\n" in text("CITATION.cff")
    assert f"\n## {project['version']}" in text("CHANGELOG.md")
