"""Nothing unpickles, evaluates text or asks a shell; data never names a path."""

import ast
import io
import json
import pathlib
import pickle
import tarfile

import jax
import numpy as np
import pytest

import flora_jax

ROOT = pathlib.Path(flora_jax.__file__).parent.parent
FOLDERS = [ROOT / "flora_jax", ROOT / "experiments"]
FILES = sorted(file for folder in FOLDERS for file in folder.rglob("*.py"))

# Modules that turn bytes into code.
UNPICKLERS = {
    "_pickle",
    "cloudpickle",
    "cPickle",
    "dill",
    "joblib",
    "marshal",
    "pickle",
    "shelve",
}
EVALUATE = {"eval", "exec", "compile", "builtins.eval", "builtins.exec"}
YAML = {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}
SHELLS = {
    "asyncio.create_subprocess_shell",
    "os.popen",
    "os.system",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
NUMPY = {"numpy.load", "jax.numpy.load", "numpy.lib.npyio.NpzFile"}
UNPACK = {"extract", "extractall", "unpack_archive"}


def imports(tree):
    """Local name -> dotted name of what it stands for, and all imported modules."""
    names, modules = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
                modules.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            modules.add(node.module)
    return names, modules


def dotted(node, names):
    """The dotted name of an expression, with imports resolved; "" if it has none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        # What a method belongs to need not have a name.
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def problem_of(call, names):
    """What is wrong with a call, or None."""
    name = dotted(call.func, names)
    # An argument that is no constant may be anything.
    given = {
        k.arg: k.value.value if isinstance(k.value, ast.Constant) else "unknown"
        for k in call.keywords
    }
    rules = {
        "evaluates text": name in EVALUATE,
        "unpickles": (
            given.get("allow_pickle", False) is not False
            # The third of numpy.load's arguments is allow_pickle.
            or (name in NUMPY and (len(call.args) > 2 or None in given))
            or (name == "torch.load" and given.get("weights_only") is not True)
            or name.endswith("read_pickle")
        ),
        "loads objects from YAML": name in YAML,
        "asks a shell": (
            name in SHELLS
            or name.startswith(("os.exec", "os.spawn"))
            or given.get("shell", False) is not False
        ),
        "unpacks an archive unfiltered": (
            name.rpartition(".")[2] in UNPACK and given.get("filter") != "data"
        ),
    }
    return next((what for what, found in rules.items() if found), None)


def problems(source):
    """All that the rules here forbid in a Python source."""
    tree = ast.parse(source)
    names, modules = imports(tree)
    found = [
        f"imports {module}"
        for module in sorted(modules)
        if module.split(".")[0] in UNPICKLERS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (what := problem_of(node, names)):
            found.append(f"line {node.lineno} {what}")
    return found


def test_no_file_does_what_is_forbidden():
    assert len(FILES) > 50
    found = {
        str(file.relative_to(ROOT)): lines
        for file in FILES
        if (lines := problems(file.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        *((f"import {name}", f"imports {name}") for name in sorted(UNPICKLERS)),
        ("from pickle import loads as f", "imports pickle"),
        ("def f():\n  import joblib.numpy_pickle", "imports joblib.numpy_pickle"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "line 2 unpickles"),
        ("from numpy import load\nload(f, allow_pickle=x)", "line 2 unpickles"),
        ("import numpy as np\nnp.load(f, None, True)", "line 2 unpickles"),
        ("import numpy as np\nnp.load(f, **options)", "line 2 unpickles"),
        ("import torch\ntorch.load(f)", "line 2 unpickles"),
        ("import torch\ntorch.load(f, weights_only=False)", "line 2 unpickles"),
        ("import pandas as pd\npd.read_pickle(f)", "line 2 unpickles"),
        ("import yaml\nyaml.load(f)", "line 2 loads objects from YAML"),
        ("from yaml import unsafe_load as f\nf(x)", "line 2 loads objects from YAML"),
        ("eval('1')", "line 1 evaluates text"),
        ("exec(text)", "line 1 evaluates text"),
        ("compile(text, '', 'exec')", "line 1 evaluates text"),
        ("import os\nos.system('ls')", "line 2 asks a shell"),
        ("from os import system as f\nf('ls')", "line 2 asks a shell"),
        ("import os\nos.execv(f, a)", "line 2 asks a shell"),
        ("import subprocess as s\ns.run('ls', shell=True)", "line 2 asks a shell"),
        ("import subprocess\nsubprocess.getoutput('ls')", "line 2 asks a shell"),
        ("tarfile.open(f).extractall(p)", "line 1 unpacks an archive unfiltered"),
        ("a.extract(m, filter='tar')", "line 1 unpacks an archive unfiltered"),
        ("zipfile.ZipFile(f).extractall()", "line 1 unpacks an archive unfiltered"),
        ("shutil.unpack_archive(f)", "line 1 unpacks an archive unfiltered"),
    ],
)
def test_the_rules_find_what_they_forbid(source, expected):
    assert problems(source) == [expected]


def test_the_rules_leave_the_rest_alone():
    allowed = """
        import re, json, subprocess, ast
        import numpy as np
        import torch
        re.compile("a"); jitted.lower(x).compile(); model.eval(); ast.literal_eval(x)
        np.load(f); np.load(f, allow_pickle=False); torch.load(f, weights_only=True)
        subprocess.run(["ls"]); subprocess.run(["ls"], shell=False)
        archive.extractfile(member); archive.extractall(p, filter="data")
        yaml.safe_load(x); json.load(f)
    """
    assert problems("\n".join(line.strip() for line in allowed.splitlines())) == []


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "../../etc/passwd",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "..",
        ".",
        "",
    ],
)
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    hugging_face = pytest.importorskip("experiments.models.hugging_face")
    from experiments.common.errors import ConfigError
    from tests.experiments.models.tiny import GPT2

    # The file is there, and still not read.
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "sub" / "sub").mkdir(parents=True)
    (tmp_path / "sub" / "sub" / "model.safetensors").write_bytes(b"")
    index = {"weight_map": {"wte.weight": name}}
    file = tmp_path / "sub" / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="must name files of its own folder, got"):
        hugging_face.load(tmp_path / "sub", GPT2)


def test_an_archive_names_no_path(tmp_path):
    """The articles of XSum are read where they lie: nothing is written."""
    builders = pytest.importorskip("experiments.data.builders")
    text = b"[XSUM]INTRODUCTION[XSUM]\nb\n[XSUM]RESTBODY[XSUM]\na\n"
    file = tmp_path / "inside" / "articles.tar.gz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        for name in ("../../escaped.data", "/absolute.data", "plain.data"):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
        link = tarfile.TarInfo("link.data")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    builder = builders.Xsum(data_dir=tmp_path / "data", file_format="array_record")
    ids = frozenset({"escaped", "absolute", "plain", "link"})
    # Names of members are names of examples, and links are not followed.
    with pytest.raises(tarfile.StreamError, match="cannot extract .*link"):
        list(builder._generate_examples(ids, file))
    assert [x for x in tmp_path.rglob("*") if x.is_file()] == [file]


@pytest.fixture
def _without_pickle(monkeypatch):
    """Whatever unpickles while a test reads, fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("something unpickles")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with pytest.raises(AssertionError, match="unpickles"):
        pickle.loads(b"N.")


@pytest.mark.usefixtures("_without_pickle")
def test_checkpoints_are_read_without_pickle(tmp_path):
    hugging_face = pytest.importorskip("experiments.models.hugging_face")
    ocp = pytest.importorskip("orbax.checkpoint")
    tensors = {"wte.weight": np.ones((3, 2), np.float32)}
    hugging_face.save_file(tensors, tmp_path / "model.safetensors")
    read = hugging_face._read_tensors(tmp_path)
    np.testing.assert_array_equal(read["wte.weight"], tensors["wte.weight"])
    sketch = flora_jax.Sketch(1, min_dim_size=2)
    state = flora_jax.compressed_momentum(0.9, sketch).init(tensors)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
