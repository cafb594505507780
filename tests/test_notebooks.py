"""Each notebook is its source, executed, and says nothing of the machine it ran on."""

import json
import re
from pathlib import Path

import pytest

import flora_jax

FOLDER = Path(flora_jax.__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
LARGEST = 400_000


def source_cells(name):
    """(kind, text) of each cell of a source in jupytext's percent format."""
    text = (FOLDER / f"{name}.py").read_text().split("\n# %%", 1)[1]
    for cell in text.split("\n# %%"):
        marker, _, body = cell.partition("\n")
        if "[markdown]" in marker:
            yield "markdown", re.sub("^# ?", "", body, flags=re.M).strip()
        else:
            yield "code", body.strip()


def executed(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def test_every_source_has_its_notebook():
    assert len(NAMES) >= 6
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_source(name):
    stored = [(c["cell_type"], "".join(c["source"]).strip()) for c in executed(name)]
    assert stored == list(source_cells(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_executed(name):
    code = [c for c in executed(name) if c["cell_type"] == "code"]
    counts = [c["execution_count"] for c in code]
    assert counts == list(range(1, len(code) + 1))
    outputs = [x for c in code for x in c["outputs"]]
    assert not [x for x in outputs if x["output_type"] == "error"]
    assert not [x for x in outputs if x.get("name") == "stderr"]
    assert any("image/png" in x.get("data", {}) for x in outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    first = "".join(code[0]["source"])
    assert '"google.colab" in sys.modules' in first
    assert "jax.devices()" in first
    assert re.search(r"^jax [\d.]+ on ", "".join(code[0]["outputs"][0]["text"]))


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_place(name):
    for cell in executed(name):
        for output in cell.get("outputs", []):
            # Printed text, and what is displayed: rich writes its lines as HTML.
            shown = {"text": output.get("text", [])} | output.get("data", {})
            texts = [x for kind, x in shown.items() if not kind.startswith("image/")]
            text = "".join("".join(x) for x in texts)
            assert not re.search(r"/(tmp|home|root|Users|work)\b", text), text
